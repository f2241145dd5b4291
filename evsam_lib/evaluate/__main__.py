"""python -m evsam_lib.evaluate"""

from .cli import main

raise SystemExit(main())
