# SPDX-License-Identifier: AGPL-3.0-or-later
"""What happens to a protected VM: events and the state that they add up to. Pure."""
