"""Where modules are looked for: in the working folder last, which may have been downloaded.

`python -m` puts the working folder first, so that a `wandb.py` or `yaml.py` in it would run in place of the installed
package. Classes of users still come from it. It stays first where neco itself lies in it: a checkout is the program.
"""

import sys

if sys.path and getattr(sys.modules["__main__"].__spec__, "name", "") == "neco.__main__":
    first = sys.path[0]  # the working folder, or of `python -P` the standard library
    if not sys.flags.safe_path and not __file__.startswith(f"{first.rstrip('/')}/neco/"):
        sys.path.append(sys.path.pop(0))
