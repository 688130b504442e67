# SPDX-License-Identifier: Apache-2.0

"""Why a part was rejected: explanations of both models, their pictures, and a page to browse them."""
