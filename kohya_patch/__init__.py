"""The adapter for kohya-ss' trainers: ``network_module = "kohya_patch"`` trains any LoRA with the frequency loss added.

sd-scripts and musubi-tuner import their network module by name and call two of the functions below. They make the
network that the trainer would have made anyway and hang the loss on the running trainer (`kohya_patch.hook`); no file
of a trainer changes.

This module is also imported at the start of every process that runs a training script (`kohya_patch.startup`), before
anything else, so it imports nothing itself.
"""

from __future__ import annotations

from typing import Any


def create_network(*arguments: Any, **network_args: Any) -> Any:
    """Make the wrapped network module's network and add the frequency loss to the run that asked for it.

    Called by sd-scripts. ``arguments`` go to the wrapped module as they are, and so do the ``network_args`` that are
    not options of the frequency loss.

    Raises:
        freq_loss_plugin.ConfigError: an option cannot be used as given.
        kohya_patch.host.UnsupportedTrainerError: this host lacks what the hook needs.
    """
    from .sd_scripts import network  # noqa: PLC0415 - see above

    return network.create_network(*arguments, **network_args)


def create_network_from_weights(*arguments: Any, **network_args: Any) -> Any:
    """As `create_network`, for a network whose dimensions come from a file. Returns ``(network, weights)``."""
    from .sd_scripts import network  # noqa: PLC0415 - see above

    return network.create_network_from_weights(*arguments, **network_args)


def create_arch_network(*arguments: Any, **network_args: Any) -> Any:
    """As `create_network`, called by musubi-tuner."""
    from .musubi import network  # noqa: PLC0415 - see above

    return network.create_network(*arguments, **network_args)


def create_arch_network_from_weights(*arguments: Any, **network_args: Any) -> Any:
    """As `create_arch_network`, for a network whose dimensions come from a file."""
    from .musubi import network  # noqa: PLC0415 - see above

    return network.create_network_from_weights(*arguments, **network_args)
