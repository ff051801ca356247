"""Makes `import k2` mean this checkout, whatever else is installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
