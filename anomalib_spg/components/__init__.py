# SPDX-License-Identifier: Apache-2.0

"""What SPG and LAKE have in common: the frozen backbone, maps, pre- and post-processing, metrics, files."""
