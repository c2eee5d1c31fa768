"""Whole programs as captum's tutorials have them, with the import changed and nothing else: the same numbers and shapes.

Each leaves what it found in `result`. What draws by itself here (NoiseTunnel, GradientShap) runs, and is compared elsewhere.
"""

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.captum.peer import IGNORED

pytestmark = [
    *(pytest.mark.filterwarnings(one) for one in IGNORED),
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks"),
    pytest.mark.filterwarnings("ignore:Multiple layers provided"),
    pytest.mark.filterwarnings("ignore:In order to make embedding layers more interpretable"),
]

SINGLE = torch.finfo(torch.float32).eps
# captum rounds weights and sums of 50 to 200 steps to float32; an average of so many roundings of float32 passes, with room
TOLERANCE = 100 * SINGLE

TABLE = """
import torch
from torch import nn
from captum.attr import DeepLift, FeatureAblation, GradientShap, IntegratedGradients, LayerConductance, NoiseTunnel
from captum.attr import NeuronConductance

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(13, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1))
houses, others = torch.randn(60, 13), torch.randn(40, 13)
houses.requires_grad_()
ig, ig_delta = IntegratedGradients(model).attribute(houses, n_steps=50, return_convergence_delta=True)
ig, lifted, ablated = ig.detach(), DeepLift(model).attribute(houses), FeatureAblation(model).attribute(houses)
smooth, shap = NoiseTunnel(IntegratedGradients(model)).attribute(houses), GradientShap(model).attribute(houses, others)
assert smooth.shape == shap.shape == houses.shape
conductance = LayerConductance(model, model[0]).attribute(houses, n_steps=20)
neuron = NeuronConductance(model, model[0]).attribute(houses, neuron_selector=3)
assert abs(ig_delta).max() < 0.1
result = [ig, lifted, ablated, conductance, neuron]
"""

PHOTOS = """
import numpy as np
import torch
from torch import nn
from captum.attr import FeatureAblation, GradientShap, IntegratedGradients, LayerAttribution, LayerGradCam, NoiseTunnel
from captum.attr import Occlusion, Saliency
from captum.attr import visualization as viz

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 8, 3),
    nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
).eval()
photo = torch.rand(1, 3, 32, 32)
score, target = torch.topk(torch.softmax(model(photo), 1), 1)
target.squeeze_()


def picture(map):
    return np.transpose(map.squeeze(0).cpu().detach().numpy(), (1, 2, 0))


gradient = Saliency(model).attribute(photo, target=target.item())
ig = IntegratedGradients(model).attribute(photo, target=target, n_steps=200)
figure, axis = viz.visualize_image_attr(
    picture(ig), picture(photo), method="heat_map", sign="positive", show_colorbar=True, outlier_perc=1, use_pyplot=False
)
smooth = NoiseTunnel(IntegratedGradients(model)).attribute(photo, nt_samples=4, nt_type="smoothgrad_sq", target=target)
viz.visualize_image_attr_multiple(
    picture(smooth), picture(photo), ["original_image", "heat_map"], ["all", "positive"], show_colorbar=True, use_pyplot=False
)
dark_and_light = torch.cat([photo * 0, photo * 1])
shap = GradientShap(model).attribute(photo, n_samples=8, stdevs=0.0001, baselines=dark_and_light, target=target)
hidden = Occlusion(model).attribute(
    photo, strides=(3, 8, 8), target=target, sliding_window_shapes=(3, 15, 15), baselines=0
)
cam = LayerGradCam(model, model[4]).attribute(photo, target=target)
cam = LayerAttribution.interpolate(cam, photo.shape[2:])
tiles = (torch.arange(32)[:, None] // 8 * 4 + torch.arange(32) // 8)[None, None]
parts = FeatureAblation(model).attribute(photo, feature_mask=tiles, target=target, perturbations_per_eval=4)
result = [gradient, ig, hidden, cam, parts]
"""

SENTENCES = """
import torch
import torch.nn.functional as F
from torch import nn
from captum.attr import LayerIntegratedGradients, TokenReferenceBase, visualization

torch.manual_seed(0)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(50, 8), nn.Linear(10, 1)
        self.convs = nn.ModuleList([nn.Conv2d(1, 5, (size, 8)) for size in (3, 4)])

    def forward(self, text):
        embedded = self.embedding(text).unsqueeze(1)
        found = [F.relu(conv(embedded)).squeeze(3) for conv in self.convs]
        return self.fc(torch.cat([F.max_pool1d(one, one.shape[2]).squeeze(2) for one in found], dim=1))


model = Words().eval()


def likes(text):
    return torch.sigmoid(model(text))


absent = TokenReferenceBase(reference_token_idx=1)
lig, records, result = LayerIntegratedGradients(likes, model.embedding), [], []
for sentence in ([3, 5, 8, 9, 11, 20, 4], [7, 7, 2, 30, 31, 32, 33, 34, 35]):
    tokens = torch.tensor(sentence).unsqueeze(0)
    model.zero_grad()
    reference = absent.generate_reference(len(sentence), device="cpu").unsqueeze(0)
    found, delta = lig.attribute(tokens, reference, n_steps=100, return_convergence_delta=True)
    result.append(found)
    found = found.sum(dim=2).squeeze(0)
    found = (found / torch.norm(found)).cpu().detach().numpy()
    probability = likes(tokens).item()
    words = [str(one) for one in sentence]
    records.append(visualization.VisualizationDataRecord(found, probability, "good", "good", "good", found.sum(), words, delta))
"""

ANSWERS = """
import torch
from torch import nn
from captum.attr import LayerIntegratedGradients, configure_interpretable_embedding_layer, remove_interpretable_embedding_layer
from captum.attr import IntegratedGradients, LayerActivation, LayerGradientXActivation

torch.manual_seed(0)


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.word, self.place, self.kind = nn.Embedding(40, 16), nn.Embedding(20, 16), nn.Embedding(2, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens, kinds, places):
        return self.norm(self.word(tokens) + self.place(places) + self.kind(kinds))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.embeddings, self.out = Embeddings(), nn.Linear(16, 2)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, tokens, kinds, places, mask=None):
        return self.out(self.encoder(self.embeddings(tokens, kinds, places), src_key_padding_mask=mask))


model = Reader().eval()


def end(tokens, kinds=None, places=None, mask=None, position=0):
    return model(tokens, kinds, places, mask)[..., position].max(1).values


tokens = torch.randint(0, 40, (1, 9))
reference, kinds, places = torch.zeros_like(tokens), torch.zeros_like(tokens), torch.arange(9)[None]
lig = LayerIntegratedGradients(end, model.embeddings)
start, delta = lig.attribute(
    inputs=tokens, baselines=reference, additional_forward_args=(kinds, places, None, 0), return_convergence_delta=True
)
last = lig.attribute(inputs=tokens, baselines=reference, additional_forward_args=(kinds, places, None, 1))
three = LayerIntegratedGradients(end, [model.embeddings.word, model.embeddings.kind, model.embeddings.place])
three = three.attribute(inputs=tokens, baselines=reference, additional_forward_args=(kinds, places, None, 0))
mine = LayerGradientXActivation(end, model.encoder.layers[0]).attribute(tokens, None, (kinds, places, None, 0))
seen = LayerActivation(end, model.encoder.layers[0]).attribute(tokens, (kinds, places, None, 0))
words = configure_interpretable_embedding_layer(model, "embeddings.word")
embedded, empty = words.indices_to_embeddings(tokens), words.indices_to_embeddings(reference)
plain = IntegratedGradients(end).attribute(embedded, empty, additional_forward_args=(kinds, places, None, 0), n_steps=20)
remove_interpretable_embedding_layer(model, words)
result = [start, last, *three, mine, seen, plain]
"""

PICTURES_AND_QUESTIONS = """
import torch
from torch import nn
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from captum.attr._utils.input_layer_wrapper import ModelInputWrapper

torch.manual_seed(0)


class Asked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.text, self.head = nn.Conv2d(3, 4, 3), nn.Embedding(30, 8), nn.Linear(12, 5)
        self.memory = nn.LSTM(8, 8, batch_first=True)

    def forward(self, v, q, q_len):
        seen = torch.relu(self.conv(v)).mean((2, 3))
        return self.head(torch.cat([seen, self.memory(torch.tanh(self.text(q)))[0][:, -1]], 1))


model = Asked().eval()
image, question, length = torch.rand(1, 3, 12, 12), torch.randint(0, 30, (1, 7)), torch.tensor([7])
wrapped = ModelInputWrapper(model)
both = LayerIntegratedGradients(wrapped, [wrapped.input_maps["v"], wrapped.module.text])
found = both.attribute(
    inputs=(image, question), baselines=(image * 0, question * 0), target=2, additional_forward_args=length, n_steps=30
)
result = list(found)
"""

METRICS = """
import torch
from torch import nn
from captum.attr import DeepLift, IntegratedGradients, Saliency
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
images = torch.rand(2, 3, 3, 3)


@infidelity_perturb_func_decorator(False)
def perturbed(inputs):
    return inputs - 0.03 * torch.ones_like(inputs)


result = [infidelity(model, perturbed, images, Saliency(model).attribute(images, target=1), target=1, n_perturb_samples=4)]
for method in (Saliency, IntegratedGradients, DeepLift):
    torch.manual_seed(1)
    result.append(sensitivity_max(method(model).attribute, images, target=1, n_perturb_samples=4))
"""

PIXELS = """
import torch
from torch import nn
from captum.attr import FeatureAblation, KernelShap, LayerAttribution, LayerGradCam, ShapleyValueSampling

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)).eval()
image = torch.rand(1, 3, 16, 16)
largest = torch.argmax(model(image), dim=1, keepdim=True)


def of_each_class(inputs):
    output = model(inputs)
    return (output * torch.zeros_like(output[0:1]).scatter_(1, largest, 1)).sum(dim=(2, 3))


cam = LayerGradCam(of_each_class, model[1]).attribute(image, target=2)
cam = LayerAttribution.interpolate(cam, image.shape[2:])
ablated = FeatureAblation(of_each_class).attribute(image, feature_mask=largest, perturbations_per_eval=2, target=2)
torch.manual_seed(1)
shapley = ShapleyValueSampling(of_each_class).attribute(image, target=2, feature_mask=largest, n_samples=5)
torch.manual_seed(1)
kernel = KernelShap(of_each_class).attribute(image, target=2, feature_mask=largest, n_samples=12)
result = [cam, ablated, shapley, kernel]
"""

CLICKS = """
import torch
from torch import nn
from captum.attr import FeatureAblation, IntegratedGradients, LayerIntegratedGradients

torch.manual_seed(0)


class Clicks(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList([nn.EmbeddingBag(20, 4, mode="sum") for _ in range(3)])
        self.below = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
        self.above = nn.Sequential(nn.Linear(4 + 6, 6), nn.ReLU(), nn.Linear(6, 1), nn.Sigmoid())

    def forward(self, dense, *sparse):
        rows = [self.below(dense), *(table(one) for table, one in zip(self.tables, sparse))]
        pairs = torch.bmm(torch.stack(rows, 1), torch.stack(rows, 2))
        upper = [pairs[:, i, j] for i in range(4) for j in range(i)]
        return self.above(torch.cat([rows[0], torch.stack(upper, 1)], 1)).squeeze(1)


model = Clicks().eval()
dense, sparse = torch.rand(6, 5), tuple(torch.randint(0, 20, (6, 3)) for _ in range(3))
ablated = FeatureAblation(model).attribute((dense, *sparse), perturbations_per_eval=2)
groups = (torch.arange(5)[None] // 2, *(torch.full((1, 3), 3 + n) for n in range(3)))
fields = FeatureAblation(model).attribute((dense, *sparse), feature_mask=groups)
ig, delta = IntegratedGradients(model).attribute(dense, additional_forward_args=sparse, return_convergence_delta=True)
layers = LayerIntegratedGradients(model, [model.tables[0], model.tables[2]])
bags = layers.attribute((dense, *sparse), baselines=(dense * 0, *(one * 0 for one in sparse)), n_steps=20)
assert delta.abs().max() < 0.01
result = [*ablated, *fields, ig, *bags]
"""

PROGRAMS = {
    "a table": TABLE,
    "photos": PHOTOS,
    "sentences": SENTENCES,
    "answers in a text": ANSWERS,
    "questions about pictures": PICTURES_AND_QUESTIONS,
    "metrics": METRICS,
    "classes of pixels": PIXELS,
    "clicks": CLICKS,
}
# sensitivity is a difference of two maps divided by their size; the fit of KernelShap is float32 with weights of up to 1e6
LOOSE = {"metrics": 1000 * SINGLE, "classes of pixels": 1000 * SINGLE}


def run(program: str) -> list[NDArray[Any]]:
    found: dict[str, Any] = {}
    exec(program, found)
    return [one.detach().numpy() for one in found["result"]]


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    mpl.use("Agg")
    before = PROGRAMS[name]
    after = before.replace("from captum", "from pysal.captum")
    assert "import captum" not in after.replace("pysal.captum", "")
    expected, found = run(before), run(after)
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in expected]
    for one, other in zip(expected, found, strict=True):
        assert np.abs(one - other).max() <= LOOSE.get(name, TOLERANCE) * np.abs(one).max()
