"""How the hook reads what people write: the file behind ``config_file``, the module to wrap, and what is ignored."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path

import hosts
import pytest

from freq_loss_plugin import ConfigError
from kohya_patch import config_file, wrapped_module


def after_sd_scripts(written, **values):
    """The arguments as sd-scripts leaves them: the name of the file has lost its last ending."""
    name = str(Path(written).with_suffix(""))
    return argparse.Namespace(config_file=name, **values)


@pytest.mark.parametrize("written", ["my.v1", "my.v1.toml", "my", "my.toml", "folder.d/my"])
@pytest.mark.parametrize("joined", [False, True])
def test_the_file_that_sd_scripts_read_is_the_one_that_is_checked(tmp_path, monkeypatch, written, joined):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / (written if written.endswith(".toml") else f"{written}.toml")
    path.parent.mkdir(exist_ok=True)
    path.write_text("[freq_loss]\nfreq_loss_metod = 'fft'\n", encoding="utf-8")
    arguments = [f"--config_file={written}"] if joined else ["--config_file", written]
    monkeypatch.setattr(sys, "argv", ["train_network.py", "--seed", "1", *arguments])
    with pytest.raises(ConfigError, match="Did you mean freq_loss_method"):
        config_file.read_config(after_sd_scripts(written, freq_loss_metod="fft"))


def test_without_a_file_there_is_nothing_to_check(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_network.py"])
    assert config_file.read(argparse.Namespace(config_file=None)) == {}
    assert config_file.read(argparse.Namespace()) == {}
    assert config_file.read(argparse.Namespace(config_file="nowhere")) == {}


@pytest.mark.parametrize("section", ["", "[network]\n"])
def test_the_module_of_the_file_is_wrapped_where_the_command_line_names_ours(tmp_path, monkeypatch, section):
    file = tmp_path / "gui.toml"
    file.write_text(f'{section}network_module = "lycoris.kohya"\n', encoding="utf-8-sig")
    monkeypatch.setattr(sys, "argv", ["train_network.py", "--config_file", str(file)])
    args = after_sd_scripts(str(file), network_module="kohya_patch", network_args=["dist_match=0.01", "algo=loha"])
    assert config_file.read_config(args).network_module == "lycoris.kohya"
    args.network_args.append("freq_loss_network_module=networks.loha")
    assert config_file.read_config(args).network_module == "networks.loha"
    file.write_text('network_module = "kohya_patch"\n', encoding="utf-8")
    assert config_file.read_config(after_sd_scripts(str(file), network_args=[])).network_module is None


def test_keys_of_another_wavelet_loss_are_named():
    args = argparse.Namespace(wavelet_loss=True, wavelet_loss_alpha=0.5, wavelet_loss_type=None, seed=1)
    (warning,) = config_file.foreign_keys(args)
    assert warning.startswith("wavelet_loss, wavelet_loss_alpha: no option of this plug-in")
    assert config_file.foreign_keys(argparse.Namespace(seed=1)) == []


@pytest.fixture
def networks_lora(monkeypatch):
    monkeypatch.syspath_prepend(str(hosts.sd_scripts()))
    return importlib.import_module("networks.lora")


@pytest.mark.sd_scripts
def test_arguments_that_the_wrapped_module_does_not_know_are_named(networks_lora):
    given = {"conv_dim": "4", "dropout": "0.1", "loraplus_lr_ratio": "4", "dist_match": "0.01"}
    assert wrapped_module.ignored_args(networks_lora, given) == []
    loha, typo = wrapped_module.ignored_args(networks_lora, {**given, "algo": "loha", "conv_dimm": "4"})
    assert "networks.lora does not know algo=loha and ignores it" in loha
    assert "freq_loss_network_module=lycoris.kohya" in loha
    assert typo == "network_args: networks.lora does not know conv_dimm=4 and ignores it"


def test_other_modules_than_those_of_sd_scripts_are_not_judged():
    assert wrapped_module.ignored_args(types.ModuleType("lycoris.kohya"), {"factor": "8"}) == []
