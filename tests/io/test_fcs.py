"""FCS files and tables of events: what is read, what is written, and how faulty files are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st

import cellweave as cw

pytest.importorskip("flowio")
NAMES = ["Time", "FSC-A", "FITC-A", "PE-A", "APC-A"]
LABELS = ["", "", "CD3", "CD19", "HLA-DR"]
VALUES = np.arange(20, dtype=np.float64).reshape(4, 5) + 0.5


def fcs_bytes(values=VALUES, names=NAMES, labels=LABELS, dtype=">f4", version="3.1", **more: str) -> bytes:
    """A file built by hand, so that reading is not tested with our own writer: big-endian, as cytometers write."""
    kind = np.dtype(dtype)
    data = np.ascontiguousarray(values, dtype=kind).tobytes()
    letter = {"f4": "F", "f8": "D", "u2": "I", "u4": "I"}[kind.str[1:]]
    order = ",".join(map(str, range(1, 5) if kind.byteorder != ">" else range(4, 0, -1)))
    keys = {"BYTEORD": order, "DATATYPE": letter, "MODE": "L", "NEXTDATA": "0", "PAR": str(len(names))}
    keys |= {"TOT": str(len(values)), "BEGINANALYSIS": "0", "ENDANALYSIS": "0", "BEGINSTEXT": "0", "ENDSTEXT": "0"}
    for i, (name, label) in enumerate(zip(names, labels, strict=True), start=1):
        keys |= {f"P{i}N": name, f"P{i}B": str(8 * kind.itemsize), f"P{i}E": "0,0", f"P{i}R": "1024"}
        keys |= {f"P{i}S": label} if label else {}
    keys |= {key.upper(): value for key, value in more.items()}
    start = 2048
    keys |= {"BEGINDATA": str(start), "ENDDATA": str(start + len(data) - 1)}
    text = "|" + "".join(f"${key}|{value}|" for key, value in keys.items())
    header = f"FCS{version}    {58:>8}{58 + len(text) - 1:>8}{start:>8}{start + len(data) - 1:>8}{0:>8}{0:>8}"
    return (header + text).encode().ljust(start) + data


def put(path: Path, **arguments) -> Path:
    path.write_bytes(fcs_bytes(**arguments))
    return path


@pytest.fixture
def cells() -> AnnData:
    """Markers, and columns of every kind."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "time": np.arange(6) * 0.5,
            "event": np.arange(6),
            "gated": [True, False] * 3,
            "population": pd.Categorical(["T", "B", None, "T", "B", "T"], categories=["T", "B", "NK"]),
        },
        index=[f"c{i}" for i in range(6)],
    )
    adata = AnnData(rng.normal(size=(6, 3)).astype(np.float32), obs=obs, var=pd.DataFrame(index=["CD3", "CD4", "CD19"]))
    adata.obsm["X_umap"] = rng.normal(size=(6, 2)).astype(np.float32)
    adata.obsm["X_scyan"] = pd.DataFrame({"CD3": np.arange(6.0)}, index=obs.index)
    return adata


# ---------------------------------------------------------------- reading FCS


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">f8", "<f8", ">u2", "<u4"])
@pytest.mark.parametrize("version", ["2.0", "3.0", "3.1"])
def test_values_and_channels(tmp_path, dtype, version):
    """Protects files of all byte orders and number types; the parser of the original dies on big-endian ones."""
    values = np.floor(VALUES) if "u" in dtype else VALUES
    adata = cw.io.read_fcs(put(tmp_path / "one.fcs", values=values, dtype=dtype, version=version))
    np.testing.assert_array_equal(adata.X, values[:, 2:])
    assert adata.X.dtype == np.float32
    assert adata.X.flags.c_contiguous
    assert list(adata.var_names) == ["CD3", "CD19", "HLA-DR"]
    assert list(adata.var["channel"]) == ["FITC-A", "PE-A", "APC-A"]
    assert list(adata.obs) == ["Time", "FSC-A", "sample"]
    np.testing.assert_array_equal(adata.obs["FSC-A"], values[:, 1])
    assert set(adata.obs["sample"]) == {"one"}
    assert json.loads(adata.uns["fcs"]["keywords"][0])["p3s"] == "CD3"
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert list(ad.read_h5ad(tmp_path / "a.h5ad").uns["fcs"]["sample"]) == ["one"]


def test_values_are_linear(tmp_path):
    """Protects intensities of old instruments: logarithmic amplification, gain and time steps are undone."""
    more = {"p3e": "4,1", "p4g": "2", "timestep": "0.01"}
    adata = cw.io.read_fcs(put(tmp_path / "a.fcs", **more))
    np.testing.assert_allclose(adata.X[:, 0], 10 ** (4 * VALUES[:, 2] / 1024), rtol=1e-6)
    np.testing.assert_allclose(adata.X[:, 1], VALUES[:, 3] / 2)
    np.testing.assert_allclose(adata.X[:, 2], VALUES[:, 4])
    np.testing.assert_allclose(adata.obs["Time"], VALUES[:, 0] * 0.01)


@pytest.mark.parametrize(
    ("labels", "suffix", "expected"),
    [
        (["", "", "CD3", "", "HLA-DR"], "S", ["Time", "FSC-A", "CD3", "PE-A", "HLA-DR"]),
        (["", "", "CD3", "CD3", "HLA-DR"], "S", ["Time", "FSC-A", "FITC-A", "PE-A", "HLA-DR"]),
        (["", "", "CD3", "FITC-A", "FITC-A"], "S", ["Time", "FSC-A", "CD3", "PE-A", "APC-A"]),
        (["", "", "PE-A", "", "HLA-DR"], "S", NAMES),
        (LABELS, "N", NAMES),
    ],
)
def test_names_of_channels(tmp_path, labels, suffix, expected):
    """Protects names: descriptions, and detectors where these are missing or not unique; no two channels get one name."""
    adata = cw.io.read_fcs(put(tmp_path / "a.fcs", labels=labels), marker_regex=None, channel_suffix=suffix)
    assert list(adata.var_names) == expected
    np.testing.assert_array_equal(adata.X, VALUES)


def test_choice_of_markers(tmp_path):
    """Protects the split: the expression is searched in lower-cased names, exclusions go to obs."""
    file = put(tmp_path / "a.fcs")
    assert list(cw.io.read_fcs(file, marker_regex="^cd|fsc", exclude_markers=["CD3"]).var_names) == ["FSC-A", "CD19"]
    for exclude in ("CD8", ["CD3", "CD8"]):
        with pytest.raises(
            ValueError, match=r"`exclude_markers` names 1 column.* lacks \(first: 'CD8'\); it has 'Time'"
        ):
            cw.io.read_fcs(file, exclude_markers=exclude)
    with pytest.raises(
        ValueError, match=r"no column that matches `marker_regex='cd99'`; it has 'Time', .*None to read all"
    ):
        cw.io.read_fcs(file, marker_regex="cd99")
    with pytest.raises(ValueError, match=r"`marker_regex='\('` is no regular expression"):
        cw.io.read_fcs(file, marker_regex="(")
    with pytest.raises(ValueError, match=r"`channel_suffix` must be 'S' or 'N', got 'X'"):
        cw.io.read_fcs(file, channel_suffix="X")


# ---------------------------------------------------------------- spillover


SPILL = np.array([[1, 0.2], [0.1, 1]])


def test_spillover_is_compensated(tmp_path):
    """Protects the way from the file to compensated values, with markers that are not in the matrix in between."""
    file = put(tmp_path / "a.fcs", spillover="2,APC-A,FITC-A,1,0.2,0.1,1")
    adata = cw.io.read_fcs(file)
    expected = VALUES[:, 2:].copy()
    expected[:, [2, 0]] = expected[:, [2, 0]] @ np.linalg.inv(SPILL)
    cw.pp.compensate(adata)
    np.testing.assert_allclose(adata.X, expected, rtol=1e-5)
    part = cw.io.read_fcs(file, marker_regex="cd3")
    assert part.uns["spillover"]["channels"].tolist() == ["APC-A", "FITC-A"]
    part.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(
        ValueError, match=r"`spillover` names 1 channel\(s\) .*\(first: 'APC-A'\); read all its channels"
    ):
        cw.pp.compensate(ad.read_h5ad(tmp_path / "a.h5ad"))


def test_spillovers_that_cannot_be_kept(tmp_path):
    """Protects against a matrix of another file, and against losing data for a damaged one."""
    one, two = (put(tmp_path / f"{i}.fcs", spillover=f"2,APC-A,FITC-A,1,0.{i},0,1") for i in (1, 2))
    with pytest.warns(UserWarning, match="2 files have 2 different spillovers, of which none is kept"):
        assert not cw.io.read_fcs([one, two]).varp
    again = put(tmp_path / "3.fcs", spillover="2,APC-A,FITC-A,1,0.1,0,1")
    assert cw.io.read_fcs([one, again]).varp["spillover"][2, 0] == 0.1
    with pytest.warns(UserWarning, match=r"The spillover of `.*4.fcs` cannot be read"):
        assert not cw.io.read_fcs(put(tmp_path / "4.fcs", spillover="2,APC-A,FITC-A,1,0.1")).varp


# ---------------------------------------------------------------- several files


def test_several_files(tmp_path):
    """Protects the origin of every cell, and unique names."""
    files = [put(tmp_path / "b.fcs"), put(tmp_path / "a.fcs", values=VALUES + 100)]
    adata = cw.io.read_fcs(files)
    assert adata.obs["sample"].tolist() == ["b"] * 4 + ["a"] * 4
    assert adata.obs["sample"].cat.categories.tolist() == ["b", "a"]
    assert adata.obs_names.is_unique
    np.testing.assert_array_equal(adata.X, np.concatenate([VALUES, VALUES + 100])[:, 2:])
    assert adata.obs["FSC-A"].tolist() == [*VALUES[:, 1], *(VALUES[:, 1] + 100)]
    assert list(adata.var["channel"]) == ["FITC-A", "PE-A", "APC-A"]
    assert adata.uns["fcs"]["sample"].tolist() == ["b", "a"]


def test_files_of_one_name(tmp_path):
    """Protects samples in folders of their own; the same file twice is a mistake."""
    for name in "xy":
        (tmp_path / name).mkdir()
    files = [put(tmp_path / name / "run.fcs") for name in "xy"]
    assert cw.io.read_fcs(files).obs["sample"].cat.categories.tolist() == ["x/run", "y/run"]
    with pytest.raises(ValueError, match=r"`path` has 2 files named 'x/run'"):
        cw.io.read_fcs([files[0], files[0]])


def test_files_with_other_markers(tmp_path):
    """Protects against markers that vanish without a word, and against zeros for what was not measured."""
    one = put(tmp_path / "a.fcs")
    two = put(tmp_path / "b.fcs", labels=["", "", "CD3", "CD4", "HLA-DR"], names=["Time", *NAMES[1:]])
    with pytest.warns(
        UserWarning, match=r"2 marker\(s\) are not in all files .*\(first: 'CD19', which 'b' lacks\); `join="
    ):
        inner = cw.io.read_fcs([one, two])
    assert list(inner.var_names) == ["CD3", "HLA-DR"]
    outer = cw.io.read_fcs([one, two], join="outer")
    expected = {"CD3": [1, 1], "CD19": [1, 0], "HLA-DR": [1, 1], "CD4": [0, 1]}
    for marker, (first, second) in expected.items():
        assert outer[:, marker].layers["_nan_mask"].ravel().tolist() == [first] * 4 + [second] * 4
        assert np.isnan(outer[:, marker].X.ravel()).tolist() == [not first] * 4 + [not second] * 4
    three = put(tmp_path / "c.fcs", labels=["", "", "CD1", "CD4", "CD5"])
    with pytest.raises(ValueError, match=r"The 2 files share no marker \(first: 'CD1', 'CD19'"):
        cw.io.read_fcs([one, three])
    with pytest.raises(ValueError, match="`join` must be 'inner' or 'outer', got 'left'"):
        cw.io.read_fcs(one, join="left")


# ---------------------------------------------------------------- faulty FCS files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is no FCS file: it begins with b'' instead of b'FCS'; check the path\.$"),
        (b"PK\x03\x04 a zip", r"is no FCS file: it begins with b'PK\\x03'"),
        (b"FCS3.1", r"is damaged or incomplete \(.*\); take another copy\.$"),
        (fcs_bytes()[:300], r"is damaged or incomplete"),
        (fcs_bytes()[:-1], r"is damaged or incomplete"),
        (fcs_bytes(tot="9"), r"announces 9 events of 5 channels and holds 20 values of 5 channels; take"),
        (fcs_bytes(par="4"), r"announces 4 events of 4 channels and holds 20 values of 5 channels; take"),
        (fcs_bytes(values=VALUES[:0]), r"is damaged or incomplete|holds no events; leave it out"),
        (fcs_bytes(byteord="3,4,1,2"), r"byte order '3,4,1,2' and the mode 'L', which cannot be read"),
        (fcs_bytes(mode="C"), r"the mode 'C', which cannot be read; save it again"),
        (fcs_bytes(datatype="A"), r"is damaged or incomplete"),
        (fcs_bytes(nextdata="4000"), r"holds several data sets; write each to a file of its own first\.$"),
        (
            fcs_bytes().replace(b"$BEGINDATA|2048", b"$BEGINDATA|2052"),
            r"contradicts itself about the place of its data",
        ),
        (fcs_bytes(p3e="4"), r"is damaged or incomplete"),
        (fcs_bytes(p3e="4,1", p3r="0"), r"describes its channels wrongly \(divide by zero"),
        (fcs_bytes(timestep="fast"), r"describes its channels wrongly .*fast"),
        (fcs_bytes(names=["Time", "A", "A", "B", "C"], labels=[""] * 5), r"names several channels 'A'; rename them"),
    ],
)
@pytest.mark.filterwarnings("ignore:unsupported byte order")
def test_faulty_files_are_refused(tmp_path, content, message):
    """Protects against values from damaged files, and against errors of the parser that name no file."""
    file = tmp_path / "bad.fcs"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        cw.io.read_fcs([put(tmp_path / "good.fcs"), file], marker_regex=None)
    assert str(file) in str(raised.value)


def test_wrong_offsets_can_be_ignored(tmp_path):
    """Protects files of programs that count the last byte wrongly: readable when asked for."""
    file = tmp_path / "a.fcs"
    file.write_bytes(fcs_bytes().replace(b"$ENDDATA|2127", b"$ENDDATA|2128") + b" ")
    with pytest.raises(ValueError, match="`ignore_offsets=True`"):
        cw.io.read_fcs(file)
    with pytest.warns(UserWarning, match="incorrect data offset"):
        np.testing.assert_array_equal(cw.io.read_fcs(file, ignore_offsets=True).X, VALUES[:, 2:])


@pytest.mark.parametrize("read", [cw.io.read_fcs, cw.io.read_cytometry_csv])
def test_missing_files(tmp_path, read):
    """Protects against an error of the operating system without advice."""
    with pytest.raises(FileNotFoundError, match=r"`.*no.fcs` is no file; check the path\.$"):
        read(tmp_path / "no.fcs")
    with pytest.raises(ValueError, match="`path` names no file; give at least one"):
        read([])


@pytest.mark.filterwarnings("ignore")
@given(st.data())
def test_any_damage_is_an_error_of_one_kind(tmp_path_factory, data):
    """Protects against crashes: a file that is cut or changed anywhere is read, or refused by name."""
    content = bytearray(fcs_bytes(dtype=data.draw(st.sampled_from([">f4", "<u2"]), label="dtype")))
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        for _ in range(data.draw(st.integers(1, 4), label="changes")):
            content[data.draw(st.integers(3, len(content) - 1), label="where")] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.fcs"
    file.write_bytes(bytes(content))
    try:
        adata = cw.io.read_fcs(file, marker_regex=None)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert len(content) == len(fcs_bytes()) or adata.n_obs > 0


def test_missing_flowio_is_named(tmp_path, cells, monkeypatch):
    """Protects users without the extra: one sentence with the command, and no half file."""
    file = put(tmp_path / "a.fcs")
    monkeypatch.setitem(sys.modules, "flowio", None)
    for call in (lambda: cw.io.read_fcs(file), lambda: cw.io.write_fcs(cells, tmp_path / "b.fcs")):
        with pytest.raises(ModuleNotFoundError, match=r'flowio, .*; run `pip install "cellweave\[cytometry\]"`\.$'):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["a.fcs"]


# ---------------------------------------------------------------- writing FCS


def test_what_is_written_is_read_again(tmp_path, cells):
    """Protects the round trip: markers bit by bit, numbers of obs and obsm, labels as numbers that are returned."""
    columns = ["time", "event", "gated", "population"]
    codes = cw.io.write_fcs(cells, tmp_path / "a.fcs", obs_columns=columns, obsm_keys=["X_umap", "X_scyan"])
    assert codes == {"population": {"T": 0, "B": 1, "NK": 2}}
    back = cw.io.read_fcs(tmp_path / "a.fcs")
    np.testing.assert_array_equal(back.X, cells.X)
    assert list(back.var_names) == list(cells.var_names)
    assert list(back.obs) == [*columns, "X_umap1", "X_umap2", "X_scyan_CD3", "sample"]
    np.testing.assert_array_equal(back.obs["population"], [0, 1, np.nan, 0, 1, 0])
    for name in columns[:3]:
        np.testing.assert_array_equal(back.obs[name], cells.obs[name].astype(float))
    np.testing.assert_array_equal(back.obs[["X_umap1", "X_umap2"]], cells.obsm["X_umap"])


def test_defaults_of_writing(tmp_path, cells):
    """Protects the choice of columns, layers, sparse, backed and viewed data, and the ranges that other readers cut at."""
    cells.layers["raw"] = sp.csr_matrix(cells.X * 1e6)
    assert cw.io.write_fcs(cells, tmp_path / "a.fcs", layer="raw", metadata={"$CYT": "ours"}) == {}
    back = cw.io.read_fcs(tmp_path / "a.fcs")
    np.testing.assert_array_equal(back.X, cells.X * 1e6)
    assert list(back.obs) == ["time", "event", "gated", "sample"]
    keywords = json.loads(back.uns["fcs"]["keywords"][0])
    assert keywords["cyt"] == "ours"
    assert back.X[:, 0].max() > 262_144  # what the library writes by itself
    assert float(keywords["p1r"]) > back.X[:, 0].max()
    cells.write_h5ad(tmp_path / "a.h5ad")
    cw.io.write_fcs(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"), tmp_path / "b.fcs")
    cw.io.write_fcs(cells[[1, 3]], tmp_path / "c.fcs")
    np.testing.assert_array_equal(cw.io.read_fcs(tmp_path / "b.fcs").X, cells.X)
    np.testing.assert_array_equal(cw.io.read_fcs(tmp_path / "c.fcs").X, cells.X[[1, 3]])


def test_spillover_is_written_with_raw_values_only(tmp_path):
    """Protects against compensating twice: transformed values are written without the matrix."""
    adata = cw.io.read_fcs(put(tmp_path / "a.fcs", spillover="2,APC-A,FITC-A,1,0.2,0.1,1"))
    cw.io.write_fcs(adata, tmp_path / "raw.fcs")
    np.testing.assert_array_equal(cw.io.read_fcs(tmp_path / "raw.fcs").varp["spillover"], adata.varp["spillover"])
    cw.pp.compensate(adata)
    cw.io.write_fcs(adata, tmp_path / "done.fcs")
    assert not cw.io.read_fcs(tmp_path / "done.fcs").varp


@pytest.mark.parametrize("suffix", ["fcs", "csv"])
def test_files_are_replaced_only_when_asked_and_whole(tmp_path, cells, suffix, monkeypatch):
    """Protects the file that is there: no silent replacement, and the old one stays if writing fails."""
    write = {"fcs": cw.io.write_fcs, "csv": cw.io.write_cytometry_csv}[suffix]
    path = tmp_path / "new" / f"a.{suffix}"
    write(cells, path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"already exists; pass `overwrite=True`"):
        write(cells, path)
    cells.X *= 2

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("flowio.create_fcs", fail)
        patch.setattr(pd.DataFrame, "to_csv", fail)
        with pytest.raises(OSError, match="disk full"):
            write(cells, path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    write(cells, path, overwrite=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("write", [cw.io.write_fcs, cw.io.write_cytometry_csv])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": "no"}, KeyError, "`layer='no'` not found"),
        ({"obs_columns": ["no"]}, KeyError, "`obs_columns` names 'no', which `adata.obs` lacks; it has 'time'"),
        ({"obsm_keys": ["no"]}, KeyError, "`obsm_keys` names 'no', which `adata.obsm` lacks; it has 'X_umap'"),
        ({"obs_columns": ["time", "time"]}, ValueError, r"1 columns would come more than once .*'time'"),
    ],
)
def test_wrong_choices_of_columns(tmp_path, cells, write, arguments, error, message):
    """Protects against files without the columns that were asked for."""
    with pytest.raises(error, match=message):
        write(cells, tmp_path / "a", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a$b", "CD3/", " ", "/x"])
def test_names_that_the_format_cannot_hold(tmp_path, cells, name):
    """Protects against names that change on the way: they are refused before the file appears."""
    cells.var_names = [name, "CD4", "CD19"]
    with pytest.raises(ValueError, match=r"cannot be written in an FCS file"):
        cw.io.write_fcs(cells, tmp_path / "a.fcs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a/b", "CD3,x", "CD45RA β", "a|b", "162Dy_CD3 (v)"])
def test_odd_names_that_it_can_hold(tmp_path, cells, name):
    """Protects unusual but possible names."""
    cells.var_names = [name, "CD4", "CD19"]
    cw.io.write_fcs(cells, tmp_path / "a.fcs")
    assert list(cw.io.read_fcs(tmp_path / "a.fcs", marker_regex=None).var_names[:3]) == [name, "CD4", "CD19"]


def test_rounded_identifiers_are_reported(tmp_path, cells):
    """Protects identifiers, of which 32-bit floats lose digits."""
    cells.obs["event"] += 2**30
    with pytest.warns(
        UserWarning, match=r"1 column\(s\) hold whole numbers that 32-bit floats round \(first: 'event'\)"
    ):
        cw.io.write_fcs(cells, tmp_path / "a.fcs")


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize("sep", [",", "\t"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tables_are_read_as_written(tmp_path, cells, sep, dtype):
    """Protects all digits, names of cells, labels and truth values."""
    cells.X = cells.X.astype(dtype) * np.array([1e-30, 1, 1e30], dtype=dtype)
    cells.obs["population"] = cells.obs["population"].astype(object).fillna("NA")
    cw.io.write_cytometry_csv(cells, tmp_path / "a.csv", sep=sep, obsm_keys=["X_umap"])
    back = cw.io.read_cytometry_csv(tmp_path / "a.csv", sep=sep)
    np.testing.assert_array_equal(back.X, cells.X.astype(np.float32))
    assert list(back.obs_names) == list(cells.obs_names)
    for name in cells.obs:
        assert back.obs[name].tolist() == cells.obs[name].tolist()
    np.testing.assert_array_equal(back.obs[["X_umap1", "X_umap2"]].astype(np.float32), cells.obsm["X_umap"])


def test_tables_of_several_files(tmp_path):
    """Protects columns that only some files have, an own `sample` column, and missing values."""
    (tmp_path / "a.csv").write_text("CD3,CD4,sample\n1,2,x\n,4,y\n")
    (tmp_path / "b.csv").write_text("CD4,Time,CD3\n5,0.5,6\n")
    adata = cw.io.read_cytometry_csv([tmp_path / "a.csv", tmp_path / "b.csv"])
    np.testing.assert_array_equal(adata.to_df()[["CD3", "CD4"]], [[1, 2], [np.nan, 4], [6, 5]])
    assert adata.obs["sample"].tolist() == ["a", "a", "b"]
    assert adata.obs["sample_in_file"].iloc[:2].tolist() == ["x", "y"]
    np.testing.assert_array_equal(adata.obs["Time"], [np.nan, np.nan, 0.5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is no table separated by ','"),
        ("CD3,CD4\n", r"holds no events; leave it out"),
        ("CD3,CD3\n1,2\n", r"has 2 columns named 'CD3'; rename them"),
        (
            "CD3,CD4\n1,2\n3,high\n",
            r"1 value\(s\) in marker 'CD4' that are no numbers \(first: 'high' in line 3\); correct",
        ),
        ("CD3,CD4\n1,2\n3,4,5\n", r"is no table separated by ','"),
        ("a,b\n1,2\n", r"no column that matches `marker_regex="),
        ("CD3;CD4\n1;2\n", r"'CD3;CD4' that are no numbers"),
    ],
)
def test_faulty_tables_are_refused(tmp_path, content, message):
    """Protects against text, missing headers and the wrong separator; the file is named."""
    file = tmp_path / "bad.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        cw.io.read_cytometry_csv(file)
    assert str(file) in str(raised.value)
