# SPDX-License-Identifier: Apache-2.0

"""Tests of ``anomalib_spg.components``."""
