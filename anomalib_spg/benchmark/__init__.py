# SPDX-License-Identifier: Apache-2.0

"""A paper's table in one command: ``python -m anomalib_spg.benchmark --config FILE``; see :mod:`.pipeline`."""
