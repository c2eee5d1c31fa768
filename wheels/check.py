"""Says whether the installed package works: run by wheels/try_each.py with the Python of an environment that has nothing else.

Usage: python check.py compiled, or uncompiled.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

WHAT = sys.argv[1]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import pysal_saliency as pysal

    info = pysal.build_info()
    ours = [str(one.message) for one in said if "pysal" in str(one.message)]

import torch  # noqa: E402 (pysal itself must find what it needs of torch)

# ---- where it lies, what it is called
site = Path(sysconfig.get_path("purelib"))
assert Path(pysal.__file__) == site / "pysal_saliency/__init__.py", pysal.__file__
import pysal as alias  # noqa: E402

assert alias is pysal, "both names are one package"
assert info["version"] == importlib.metadata.version("pysal-saliency") == pysal.__version__, info
assert info["torch"] == torch.__version__, info

# ---- what it says of itself
if WHAT == "compiled":
    assert not ours, ours
    assert info["compiled"], info
    assert {kernels["cpu"] for kernels in info["kernels"].values()} == {"native"}, info["kernels"]
    assert info["version_built"] == info["version"], info
    assert info["torch_target"] == "2.11", info
    assert info["simd"] in info["simd_compiled"], info
    held = {Path(file.locate()).name for file in importlib.metadata.files("pysal-saliency") or [] if file.suffix == ".so"}
    assert {"_C_cpu.so", f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"} <= held, held
    if "_C_cuda.so" in held and torch.version.cuda is not None:
        assert info["cuda"] == "loaded", info
else:
    assert len(ours) == 1, ours
    assert "pysal is not compiled in " in ours[0], ours
    assert not info["compiled"], info
    assert {kernels["cpu"] for kernels in info["kernels"].values()} == {"reference"}, info["kernels"]

# ---- what it computes
with warnings.catch_warnings():
    if WHAT == "compiled":
        warnings.simplefilter("error")
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((2, 3, 12, 12), generator=generator)
    weights = torch.randn((5, 3, 3, 3), generator=generator), torch.randn((4, 500), generator=generator)
    convolution, linear = torch.nn.Conv2d(3, 5, 3, bias=False), torch.nn.Linear(500, 4, bias=False)
    for layer, weight in zip((convolution, linear), weights, strict=True):
        layer.weight = torch.nn.Parameter(weight)
    model = torch.nn.Sequential(convolution, torch.nn.ReLU(), torch.nn.Flatten(), linear).eval()
    before = torch.nn.functional.conv2d(images, weights[0])
    after = weights[1][1].reshape(1, 5, 10, 10)
    plain = torch.nn.functional.conv_transpose2d(after * (before > 0), weights[0])
    guided = torch.nn.functional.conv_transpose2d(after.clamp(min=0) * (before > 0), weights[0])
    torch.testing.assert_close(pysal.gradient(model, images, 1, score="logit"), plain)
    torch.testing.assert_close(pysal.guided_backprop(model, images, 1, score="logit"), guided)

    filled = images.clone()
    filled[:, :, :4, :4] = 0
    drops = pysal.leave_one_out(model, images, 1, segments=pysal.Grid(3, 3), score="logit")
    torch.testing.assert_close(drops[..., 0, 0].flatten(), (model(images) - model(filled))[:, 1].detach())

    output, gates = pysal.ops.guided_relu(before, 1.5)
    wanted, wanted_gates = pysal.reference.guided_relu.guided_relu(before, 1.5, 0)
    assert torch.equal(output, wanted)
    assert torch.equal(gates, wanted_gates)

# ---- the command
command = [Path(sysconfig.get_path("scripts")) / "pysal", "info"]
printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
facts = dict(line.split(maxsplit=1) for line in printed.splitlines() if len(line.split()) == 2)
assert facts["compiled"] == ("yes" if WHAT == "compiled" else "no"), printed
print(f"{WHAT}: Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA of torch {torch.version.cuda}: {info['cuda']}")
