"""Makes the helper modules of this folder importable: layer_cases, family_cases."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
