# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_spg.benchmark``."""

from .pipeline import main

if __name__ == "__main__":
    main()
