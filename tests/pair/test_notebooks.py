"""The programs of PAIR's example notebooks from the first cell to the last, as texts of which the import alone is changed.

The networks are small and the frameworks PyTorch and NumPy. Each program leaves in `result` what it shows.
"""

from typing import Any

import numpy as np
import pytest

from tests.pair.test_against_pair import quantile_of_older_numpy  # noqa: F401, used by every test
from tests.pair.test_pic import trapz_of_older_numpy  # noqa: F401, used by every test

PYTORCH = """
import numpy as np
import torch
from matplotlib import pylab as P
from PIL import Image
import saliency.core as saliency

result = []

def show(picture, title, ax=None, **how):
    if ax is None:
        P.figure()
    P.axis("off")
    P.imshow(picture, **how)
    P.title(title)
    result.append(np.asarray(picture))

def load():
    blotches = np.random.default_rng(1).integers(40, 200, (5, 5, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(blotches).resize((25, 25)))

def preprocess(images):
    images = np.transpose(np.array(images) / 255, (0, 3, 1, 2))
    mean, deviation = (torch.tensor(one).reshape(3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((torch.tensor(images, dtype=torch.float64) - mean) / deviation).requires_grad_(True)

torch.manual_seed(1)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(96, 5)
).double()
eval_mode = model.eval()
conv_layer_outputs = {}

def forward_hook(module, inputs, output):
    conv_layer_outputs[saliency.base.CONVOLUTION_LAYER_VALUES] = torch.movedim(output, 1, 3).detach().numpy()

def backward_hook(module, inputs, output):
    conv_layer_outputs[saliency.base.CONVOLUTION_OUTPUT_GRADIENTS] = torch.movedim(output[0], 1, 3).detach().numpy()

model[0].register_forward_hook(forward_hook)
model[0].register_full_backward_hook(backward_hook)
class_idx_str = "class_idx_str"

def call_model_function(images, call_model_args=None, expected_keys=None):
    images = preprocess(images)
    target = call_model_args[class_idx_str]
    output = torch.nn.Softmax(dim=1)(model(images))
    if saliency.base.INPUT_OUTPUT_GRADIENTS in expected_keys:
        outputs = output[:, target]
        (grads,) = torch.autograd.grad(outputs, images, grad_outputs=torch.ones_like(outputs))
        return {saliency.base.INPUT_OUTPUT_GRADIENTS: torch.movedim(grads, 1, 3).detach().numpy()}
    one_hot = torch.zeros_like(output)
    one_hot[:, target] = 1
    model.zero_grad()
    output.backward(gradient=one_hot, retain_graph=True)
    return conv_layer_outputs

im_orig = load()
prediction_class = int(np.argmax(model(preprocess([im_orig])).detach().numpy()[0]))
call_model_args = {class_idx_str: prediction_class}
im = im_orig.astype(np.float64)
show(im_orig, "the image")

gradient_saliency = saliency.GradientSaliency()
vanilla = gradient_saliency.GetMask(im, call_model_function, call_model_args)
np.random.seed(0)
smooth = gradient_saliency.GetSmoothedMask(im, call_model_function, call_model_args, nsamples=3)
for rows, (mask, title) in enumerate([(vanilla, "Vanilla Gradient"), (smooth, "SmoothGrad")]):
    show(saliency.VisualizeImageGrayscale(mask), title, ax=P.subplot(1, 2, rows + 1), cmap=P.cm.gray, vmin=0, vmax=1)

integrated_gradients, baseline = saliency.IntegratedGradients(), np.zeros(im.shape)
given = {"x_steps": 5, "x_baseline": baseline, "batch_size": 4}
show(saliency.VisualizeImageGrayscale(integrated_gradients.GetMask(im, call_model_function, call_model_args, **given)), "IG")
smooth = integrated_gradients.GetSmoothedMask(im, call_model_function, call_model_args, nsamples=2, **given)
show(saliency.VisualizeImageGrayscale(smooth), "smoothed IG")

xrai_object = saliency.XRAI()
attributions = xrai_object.GetMask(im, call_model_function, call_model_args, batch_size=20)
show(attributions, "XRAI", cmap="inferno")
salient = attributions > np.percentile(attributions, 70)
picture = np.array(im_orig)
picture[~salient] = 0
show(picture, "Top 30%")
xrai_params = saliency.XRAIParameters()
xrai_params.algorithm = "fast"
quick = xrai_object.GetMask(im, call_model_function, call_model_args, extra_parameters=xrai_params, batch_size=20)
show(quick, "XRAI fast", cmap="inferno")

grad_cam = saliency.GradCam()
show(saliency.VisualizeImageGrayscale(grad_cam.GetMask(im, call_model_function, call_model_args)), "Grad-CAM")
smooth = grad_cam.GetSmoothedMask(im, call_model_function, call_model_args, nsamples=2)
show(saliency.VisualizeImageGrayscale(smooth), "smoothed Grad-CAM")

guided_ig = saliency.GuidedIG()
guided = guided_ig.GetMask(
    im, call_model_function, call_model_args, x_steps=6, x_baseline=baseline, max_dist=1.0, fraction=0.5
)
show(saliency.VisualizeImageGrayscale(guided), "Guided IG")

blur_ig = saliency.BlurIG()
blurred = blur_ig.GetMask(im, call_model_function, call_model_args, batch_size=20, steps=6)
show(saliency.VisualizeImageGrayscale(blurred), "Blur IG")
smooth = blur_ig.GetSmoothedMask(im, call_model_function, call_model_args, nsamples=2, batch_size=20, steps=4)
show(saliency.VisualizeImageGrayscale(smooth), "smoothed Blur IG")
P.close("all")
"""

# A model of no framework: two layers of NumPy, whose gradients are written out, and which answers by the keys it is asked for.
CORE = """
import numpy as np
import saliency.core as saliency
from saliency.core import base

random = np.random.default_rng(3)
filters, head = random.normal(size=(3, 4)), random.normal(size=(4, 5))
class_idx_str = "class_idx_str"

def call_model_function(images, call_model_args=None, expected_keys=None):
    images, target = np.asarray(images), call_model_args[class_idx_str]
    before = images @ filters
    layer = np.tanh(before)
    rows = np.linspace(1, 2, images.shape[1])[:, None, None]
    output = (layer**2 * rows).mean((1, 2)) @ head
    values = np.broadcast_to(2 * layer * rows / layer[0, ..., 0].size * head[:, target], layer.shape)
    if expected_keys == [saliency.base.INPUT_OUTPUT_GRADIENTS]:
        return {saliency.base.INPUT_OUTPUT_GRADIENTS: (values * (1 - layer**2)) @ filters.T}
    if expected_keys == [base.OUTPUT_LAYER_VALUES]:
        return {base.OUTPUT_LAYER_VALUES: output[:, target]}
    assert sorted(expected_keys) == sorted([base.CONVOLUTION_LAYER_VALUES, base.CONVOLUTION_OUTPUT_GRADIENTS])
    return {base.CONVOLUTION_LAYER_VALUES: layer, base.CONVOLUTION_OUTPUT_GRADIENTS: values}

im = random.normal(size=(20, 18, 3))
im[4:12, 5:13] += 1.0
args = {class_idx_str: 2}
baseline = np.zeros(im.shape)
result = []

def keep(mask):
    result.extend([mask, saliency.VisualizeImageGrayscale(mask)])
    if mask.ndim == 3:
        result.append(saliency.VisualizeImageDiverging(mask))

keep(saliency.GradientSaliency().GetMask(im, call_model_function, args))
keep(saliency.IntegratedGradients().GetMask(im, call_model_function, args, x_steps=5, x_baseline=baseline, batch_size=3))
keep(saliency.GuidedIG().GetMask(im, call_model_function, args, x_steps=5, x_baseline=baseline, max_dist=0.2, fraction=0.5))
keep(saliency.BlurIG().GetMask(im, call_model_function, args, steps=5, batch_size=5))
keep(saliency.Occlusion().GetMask(im, call_model_function, args, size=7))
keep(saliency.GradCam().GetMask(im, call_model_function, args, three_dims=True))
params = saliency.XRAIParameters(steps=4, return_xrai_segments=True, flatten_xrai_segments=False)
found = saliency.XRAI().GetMaskWithDetails(im, call_model_function, args, extra_parameters=params, batch_size=8)
result.extend([found.attribution_mask, *found.segments])
for answer in ({}, {saliency.base.INPUT_OUTPUT_GRADIENTS: im}):
    try:
        saliency.GradientSaliency().GetMask(im, lambda *given, **named: answer, args)
    except (KeyError, ValueError) as error:
        result.append(np.array([isinstance(error, one) for one in (KeyError, ValueError)]))
"""

PIC = """
import matplotlib.pyplot as plt
import numpy as np
import saliency.core as saliency
from saliency.metrics import pic

result = []
random = np.random.default_rng(5)
im = np.kron(random.integers(0, 128, (8, 8, 3)), np.ones((5, 5, 1))) + random.integers(0, 128, (40, 40, 3)).astype(float)
im[:8], im[24:], im[:, :12], im[:, 30:] = im[:8] / 4, im[24:] / 4, im[:, :12] / 4, im[:, 30:] / 4
im = im.astype(np.uint8)
weights = np.zeros((40, 40, 3))
weights[8:24, 12:30] = 1 / 864

def probabilities(images):
    share = 1.3 * (np.asarray(images, np.float64) * weights).sum((1, 2, 3)) / 255
    return np.stack([share, 1 - share], 1)

def call_model_function(images, call_model_args=None, expected_keys=None):
    return {saliency.base.INPUT_OUTPUT_GRADIENTS: np.broadcast_to(weights / 255, np.shape(images))}

gradients = saliency.GradientSaliency().GetMask(im.astype(np.float32), call_model_function, None)
saliency_map = saliency.VisualizeImageGrayscale(np.abs(gradients))
np.random.seed(0)
random_mask = pic.generate_random_mask(image_height=40, image_width=40, fraction=0.01)
saliency_thresholds = [0.01, 0.02, 0.05, 0.1, 0.3, 0.5]
curves = []
for name, func, minimum in (("SIC", lambda images: probabilities(images)[:, 0], 0.0),
                            ("AIC", lambda images: (probabilities(images).argmax(1) == 0).astype(float), 0.0)):
    metric = pic.compute_pic_metric(
        img=im, saliency_map=saliency_map, random_mask=random_mask, pred_func=func, min_pred_value=minimum,
        saliency_thresholds=saliency_thresholds, keep_monotonous=True, num_data_points=100,
    )
    plt.subplots(figsize=(12, 6))[1].plot(metric.curve_x, metric.curve_y, label=f"{name}, AUC={metric.auc:.3f}")
    result.extend([metric.curve_x, metric.curve_y, metric.auc, *metric.blurred_images, metric.predictions, metric.thresholds])
    curves.append(metric)
together = pic.aggregate_individual_pic_results(curves, method="median")
result.extend([together.curve_x, together.curve_y, together.auc])
try:
    pic.compute_pic_metric(img=im, saliency_map=saliency_map, random_mask=random_mask, pred_func=lambda images: np.zeros(
        len(images)), saliency_thresholds=saliency_thresholds, min_pred_value=0.8)
except pic.ComputePicMetricError as error:
    result.append(np.array(True))
plt.close("all")
"""

# Means of at most 30 maps of float32 and sums of at most 625 pixels that PAIR adds up in float32, each shown by its range.
TOLERANCE = 10 * 625 * np.finfo(np.float32).eps


def shown(program: str) -> list[Any]:
    """What a program leaves in `result`."""
    found: dict[str, Any] = {}
    exec(program, found)
    return [np.asarray(one) for one in found["result"]]


@pytest.mark.parametrize("name", ["PYTORCH", "CORE", "PIC"])
def test_notebooks(name: str) -> None:
    program = globals()[name]
    changed = program.replace("import saliency.core as saliency", "import pysal.pair as saliency")
    changed = changed.replace("from saliency.core", "from pysal.pair").replace("from saliency", "from pysal.pair")
    assert "pysal.pair" in changed
    assert "import saliency" not in changed
    expected, found = shown(program), shown(changed)
    assert len(found) == len(expected) > 6
    for number, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        assert ours.shape == theirs.shape
        if theirs.dtype.kind in "biu":
            assert np.array_equal(ours, theirs), number
        else:
            scale = float(np.abs(theirs).max()) or 1.0
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * scale, err_msg=str(number))
