"""The network module that is wrapped: which one it is, whether it fits the trainer, and what it does not take."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from freq_loss_plugin import ConfigError, FreqLossConfig

from .host import Host
from .protocols import Family

OWN_NAME = "kohya_patch"
# The hosts pass them to every module, whether it knows them or not.
_PASSED_BY_HOST = ("dropout", "neuron_dropout")
# Options by which LyCORIS chooses what it trains.
_LYCORIS = ("algo", "preset", "conv_dim", "conv_alpha", "factor", "decompose_both", "use_tucker", "dora_wd")


def name_of(config: FreqLossConfig, family: Family | None, default: str = "networks.lora") -> str:
    """Its name: the one that was given, or the LoRA module of the trainer."""
    return config.network_module or (family.network_module if family else default)


def own_args(network_args: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``network_args`` that are not options of the loss, but belong to the module."""
    return {key: value for key, value in network_args.items() if not FreqLossConfig.claims(key)}


def ignored_args(module: ModuleType, network_args: Mapping[str, Any]) -> list[str]:
    """A warning where a module of the host gets arguments that it never looks at.

    They take any keyword, and read those that they know by name; so a name that is neither a parameter of the functions
    that make a network nor a text in the source is not read.
    """
    if not _is_of_host(module):
        return []
    # musubi-tuner's modules hand their arguments to one that they import.
    modules = [module, *filter(_is_of_host, vars(module).values())]
    makers = [getattr(each, name, None) for each in modules for name in ("create_network", "create_arch_network")]
    parameters = [name for maker in makers if maker is not None for name in inspect.signature(maker).parameters]
    texts = [text for each in modules for text in re.findall(r"""["'](\w+)["']""", inspect.getsource(each))]
    ignored = [key for key in own_args(network_args) if key not in {*_PASSED_BY_HOST, *parameters, *texts}]
    found = []
    for key in ignored:
        lycoris = "; it is one of LyCORIS: add freq_loss_network_module=lycoris.kohya (pip install lycoris_lora)"
        hint = lycoris if key in _LYCORIS else ""
        found.append(f"network_args: {module.__name__} does not know {key}={network_args[key]} and ignores it{hint}")
    return found


def _is_of_host(value: Any) -> bool:
    return isinstance(value, ModuleType) and "networks" in value.__name__.split(".")[:-1]


def check_name(name: str, host: Host) -> None:
    """Whether the module is there.

    Raises:
        ConfigError: it is not.
    """
    key = f"freq_loss_network_module = {name!r}"
    if name.split(".")[0] == OWN_NAME:
        raise ConfigError(
            f"{key}: kohya_patch cannot wrap itself; name the module to train, for instance {host.plain_module}"
        )
    if find(name) is None:
        raise ConfigError(
            f"{key}: no such Python module; expected a network module that {host.name} can import, for instance "
            f"{', '.join(host.network_modules)}, or lycoris.kohya (pip install lycoris_lora)"
        )


def find(name: str) -> ModuleSpec | None:
    """Where a module is; None where there is none of that name."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
