import pytest
import torch

from lm_saes import devices
from lm_saes.config import SAEConfig
from lm_saes.devices import resolve_device, widest_float
from lm_saes.errors import DeviceError
from lm_saes.models import SparseDictionary


def test_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("meta") == torch.device("meta")
    assert resolve_device("auto").type in devices.available_devices()
    assert widest_float(torch.device("cpu")) == torch.float64
    assert widest_float(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(("there", "best"), [(["cpu"], "cpu"), (["cpu", "mps"], "mps"), (["cpu", "cuda", "cuda:0", "mps"], "cuda")])
def test_auto_is_the_best_there_is(monkeypatch, there, best):
    monkeypatch.setattr(devices, "available_devices", lambda: there)
    assert resolve_device("auto") == torch.device(best)


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps"])
def test_an_absent_device_is_an_error_when_a_dictionary_is_built_and_not_before(monkeypatch, name):
    monkeypatch.setattr(devices, "available_devices", lambda: ["cpu", "cuda:9"])
    cfg = SAEConfig(hook_point_in="a", d_model=4, expansion_factor=2, device=name)
    with pytest.raises(DeviceError, match=f"wanted device '{name}', which is not here; there are cpu, cuda:9"):
        SparseDictionary.from_config(cfg)


def test_nonsense():
    with pytest.raises(DeviceError, match="wanted a device, got 'gpu'; there are cpu"):
        resolve_device("gpu")
