# SPDX-License-Identifier: Apache-2.0

"""Measurements run by hand; each module says its command."""
