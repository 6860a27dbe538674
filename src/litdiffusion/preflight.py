"""What every entry point imports first.

With a release installed that is known to be bad, the command ends here, before that release is imported.
"""

import sys

from litdiffusion.errors import UserError
from litdiffusion.releases import check_releases

try:
    check_releases()
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
