"""Makes ``ccfm_numbers`` importable in the parity tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
