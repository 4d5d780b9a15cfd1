import os
import platform
import subprocess
import sys

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


STEPS = """
import resource, sys, torch
from lm_saes.devices import reuse_freed_memory
if sys.argv[1] == "reuse":
    reuse_freed_memory()
def step():
    return torch.ones(20_000_000).sum()  # 80 MB
for _ in range(8):  # the heap takes a few steps to settle
    step()
before = resource.getrusage(resource.RUSAGE_SELF)
for _ in range(10):
    step()
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt, after.ru_maxrss - before.ru_maxrss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_used_again():
    """Large tensors cause no page faults after the first, and the process does not grow; an environment that sets malloc up is obeyed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}

    def faults(how, **more):
        run = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True, env={**environment, **more})
        return [int(number) for number in run.stdout.split()]

    (plain, _), (reused, grown), (obeyed, _) = faults("plain"), faults("reuse"), faults("reuse", MALLOC_MMAP_MAX_="65536")
    assert reused < 0.2 * plain  # the first of ten rounds is a tenth
    assert grown < 20_000  # KB
    assert obeyed > 0.5 * plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 40, 48), (120, 48)])
def test_linear_layers_without_gradient_are_those_of_torch_but_for_rounding(monkeypatch, bias, shape):
    used = []
    fast = devices.fast_linear
    monkeypatch.setattr(devices, "fast_linear", lambda *tensors: used.append(1) or fast(*tensors))
    layer, x = torch.nn.Linear(48, 24, bias=bias), torch.randn(shape)
    wanted = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None).float().detach()
    with devices.FastLinear(), torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)
        assert len(used) == 1
        layer(x.flatten(0, -2)[:5])  # few rows
        assert len(used) == 1
        torch.testing.assert_close(layer.bfloat16()(x.bfloat16()), layer.float()(x).bfloat16(), rtol=2e-2, atol=2e-2)
    n_used = len(used)
    with devices.FastLinear():
        layer(x).sum().backward()
    assert len(used) == n_used


def test_fast_linear_says_where_it_does_not_apply():
    x, weight = torch.randn(4, 3), torch.randn(2, 3)
    assert devices.fast_linear(x.double(), weight.double(), None) is None
    if (product := devices.fast_linear(x, weight, None)) is not None:
        torch.testing.assert_close(product, x @ weight.t())
