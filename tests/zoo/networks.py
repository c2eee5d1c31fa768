"""Small networks, each with one habit of writing models that tools of this kind stumble over.

All are one network, `Net`, but for what a line here changes, or a few lines of their own. `twin` is the same function written
plainly, for the oracle: where a network is compiled, scripted, quantised or wrapped, and so cannot be turned into float64.
"""

import collections
import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Function = Callable[..., Any]


def as_it_is(_net: Any, values: Any) -> Any:
    return values


class Net(nn.Module):
    """Two convolutions with functional ReLUs and a linear head; `inside` acts between them, `outside` on the output."""

    passes: Tensor

    def __init__(
        self,
        inside: Function = as_it_is,
        outside: Function = as_it_is,
        *,
        before: Function = as_it_is,
        channels: int = 3,
        classes: int = 3,
    ) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.other = nn.Linear(4, classes), nn.Linear(4, 2)
        self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)
        self.before, self.inside, self.outside = before, inside, outside
        self.register_buffer("passes", torch.zeros(()))

    def maps(self, images: Tensor) -> Tensor:
        return F.relu(self.second(self.inside(self, F.relu(self.first(self.before(self, images))))))

    def forward(self, images: Tensor) -> Any:
        return self.outside(self, self.head(4 * self.maps(images).mean((2, 3))))


class Ungraded(Net):
    """Made for prediction alone."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)


class Sequence(nn.Module):
    """Reads each image's rows of pixels with a network for sequences that is fed as `feed` says."""

    def __init__(self, body: Callable[[int], nn.Module], feed: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.feed = body(18), nn.Linear(4, 3), feed

    def forward(self, images: Tensor) -> Tensor:
        return self.head(3 * self.feed(self.body, images.permute(0, 2, 1, 3).flatten(2)))  # (N, T, F)


class Attention(nn.Module):
    """Patches that look at each other, with a class token; `over_batch` mistakes the batch for the sequence."""

    def __init__(self, *, over_batch: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=not over_batch, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        cells = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.encoder(torch.cat([self.token.expand(len(cells), 1, 4), cells], 1)).mean(1))


class Graph(nn.Module):
    """Pixels as nodes, joined with the next; a vector says which image each belongs to, as libraries of graphs do."""

    def __init__(self, batch_of: Callable[[int, int], Tensor]) -> None:
        super().__init__()
        self.node, self.head, self.batch_of = nn.Linear(3, 4), nn.Linear(4, 3), batch_of

    def forward(self, images: Tensor) -> Tensor:
        nodes = images.flatten(2).transpose(1, 2).flatten(0, 1)
        batch = self.batch_of(len(images), images.shape[2] * images.shape[3])
        hidden = torch.relu(self.node(nodes))
        hidden = hidden + torch.zeros_like(hidden).index_add(0, torch.arange(1, len(hidden)), hidden[:-1])
        return self.head(hidden.new_zeros(int(batch.max()) + 1, 4).index_add(0, batch, hidden))


class Streams(nn.Module):
    """Two streams, for the first channel and the others, that meet at the head."""

    def __init__(self) -> None:
        super().__init__()
        self.grey, self.colour, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(2, 4, 3), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.cat([torch.relu(self.grey(images[:, :1])), torch.relu(self.colour(images[:, 1:]))], 1)
        return self.head(4 * maps.mean((2, 3)))


class Siamese(nn.Module):
    """How alike an image and its mirror image are to one network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images: Tensor) -> Tensor:
        return (self.net(images) * self.net(images.flip(3))).cumsum(1)


class Shared(nn.Module):
    """One convolution and one ReLU, in place, used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        for _ in range(3):
            images = self.relu(self.conv(images))
        return self.head(9 * images.mean((2, 3)))


class Table(nn.Module):
    """A perceptron for rows of a table, laid out as images (N, 1, 1, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)


class Reversal(torch.autograd.Function):
    """Hands gradients on with the other sign."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


Pair = collections.namedtuple("Pair", ["scores", "features"])


class Output(collections.OrderedDict[str, Any]):
    """What transformers' models return: a mapping with attributes."""

    @property
    def logits(self) -> Any:
        return self["logits"]


class Kept(Tensor):
    """A subclass of Tensor, as libraries for images and metadata define them."""


@dataclass(frozen=True)
class Network:
    """How a network is made and asked.

    Attributes:
        build: the network as its user holds it.
        twin: the same function in plain modules, of which the oracle makes a float64 copy; None = the network itself.
        shape: of the images (B, C, H, W).
        dtype: of the images and weights.
        target: what is explained.
        pick: the model's output -> the explained number of each row (N,); None = the target's column.
        layer: where Grad-CAM looks by default; "" = there is no such layer.
        coupled: whether a row of a pass depends on the others.
        numbers: whether the output is one number for each image, with no column to pick.
        chance: whether it answers otherwise each time.
        refuses: parts of the names of faces that may refuse the network, beside what `coupled` and `layer` imply.
        unlike: faces that mean something else by the output, which captum's do where it is not (N, K).
        exact: dtype of the oracle.
    """

    build: Callable[[], Any]
    twin: Callable[[], Any] | None = None
    shape: tuple[int, int, int, int] = (2, 3, 6, 6)
    dtype: torch.dtype = torch.float64
    target: Any = 1
    pick: Callable[[Any], Tensor] | None = None
    layer: str = "second"
    coupled: bool = False
    numbers: bool = False
    chance: bool = False
    refuses: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    exact: torch.dtype = torch.float64


def seeded(build: Callable[[], Any], dtype: torch.dtype = torch.float64) -> Any:
    """Build in eval mode, with weights that are the same each time; what is no module is returned as it is."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of ways that people go on using
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(3)
        made = build()
        ready = not isinstance(made, nn.Module) or isinstance(made, (torch.jit.ScriptModule, torch.fx.GraphModule))
        return made if ready else made.to(dtype).eval()


def net(*args: Any, **options: Any) -> Callable[[], Net]:
    return lambda: Net(*args, **options)


def wrapped(wrap: Callable[[nn.Module], Any], dtype: torch.dtype = torch.float64) -> Callable[[], Any]:
    """Wrap the plain network once it has its weights and its dtype."""

    def build() -> Any:
        return wrap(seeded(Net, dtype))

    return build


def column(index: int) -> Callable[[Tensor], Tensor]:
    return lambda output: output[:, index]


def called(net: Net, values: Tensor) -> Tensor:
    weights = {name: 2 * weight for name, weight in net.mix.named_parameters()}
    return torch.func.functional_call(net.mix, weights, (values.movedim(1, -1),)).movedim(-1, 1)


def hooked(kind: str) -> Callable[[], Net]:
    def build() -> Net:
        made = Net()
        if kind == "forward":
            made.second.register_forward_hook(lambda _module, _args, output: 2 * output)
        elif kind == "before":
            made.second.register_forward_pre_hook(lambda _module, args: (args[0].square(),))
        else:
            made.second.register_full_backward_hook(lambda _module, grads, _out: (grads[0] * 3,))
        return made

    return build


def parametrized(which: str) -> Callable[[], Net]:
    def build() -> Net:
        made = Net()
        norm = nn.utils.parametrizations.spectral_norm if which == "spectral" else nn.utils.parametrizations.weight_norm
        norm(made.second)
        return made

    return build


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(seeded(Table, torch.float32), {nn.Linear})


class Scripted(nn.Module):
    """A traced half inside an ordinary network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.scripted = False

    def forward(self, images: Tensor) -> Tensor:
        return self.head(4 * torch.relu(self.second(torch.relu(self.first(images)))).mean((2, 3)))


def script_inside() -> nn.Module:
    made = seeded(Scripted)
    made.first = torch.jit.script(nn.Sequential(made.first, nn.ReLU())).eval()
    return made  # type: ignore[no-any-return]


def exported(made: nn.Module) -> Any:
    rows = torch.export.Dim("rows", min=1, max=4096)
    example = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    return torch.export.export(made, (example,), dynamic_shapes=({0: rows},)).module()


def exported_to_core_operations(made: nn.Module) -> Any:
    rows = torch.export.Dim("rows", min=1, max=4096)
    program = torch.export.export(made, (torch.rand(2, 3, 6, 6, dtype=torch.float64),), dynamic_shapes=({0: rows},))
    return program.run_decompositions().module()


def by_sizes(_net: Net, values: Tensor) -> Tensor:
    """What torch.fx does not get through, and torch.export does."""
    found = {"small": values} if values.shape[2] < 4 else {"small": -values, "large": values}
    return found["large"] if len(found) > 1 else found["small"]


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Net().double()


def under(context: Callable[[], Any]) -> Function:
    def run(net: Net, values: Tensor) -> Tensor:
        with context():
            seen = net.mix(values.movedim(1, -1)).movedim(-1, 1)
        return values * seen

    return run


def energy(_net: Net, scores: Tensor) -> Tensor:
    """A score that is itself a gradient, as forces and fields are."""
    with torch.enable_grad():
        leaf = scores if scores.requires_grad else scores.detach().requires_grad_()
        return torch.autograd.grad(leaf.pow(3).sum(), leaf, create_graph=True)[0]


def switched_on(net: Net, values: Tensor) -> Tensor:
    with torch.enable_grad():
        return values + 0 * net.second(values)


def group(parts: int) -> Function:
    return lambda _net, values: F.group_norm(values, parts)


def in_place(_net: Any, values: Tensor) -> Tensor:
    return values.sub_(0.5).mul_(2)


def sorted_and_back(_net: Any, values: Tensor) -> Tensor:
    order = values.flatten(1).sum(1).argsort()
    return values[order].square()[order.argsort()]


def named_batch(number: int, nodes: int) -> Tensor:
    return torch.arange(number).repeat_interleave(nodes)


def keep(net: Net, values: Tensor) -> Tensor:
    net.__dict__["seen"] = values
    return values


def in_one_buffer(net: Net, values: Tensor) -> Tensor:
    """Answers as captured graphs and some runtimes do, where no gradients are kept."""
    if torch.is_grad_enabled():
        return values
    if getattr(net, "answer", None) is None or net.answer.shape != values.shape:
        net.__dict__["answer"] = torch.empty_like(values)
    answer: Tensor = net.answer
    return answer.copy_(values)


def counted(net: Net, values: Tensor) -> Tensor:
    net.passes += 1
    return values


def flows(net: Net, values: Tensor) -> Tensor:
    return values + (torch.round(values) - values).detach()


def first_tokens(output: Any) -> Tensor:
    return output[0][:, 1]


# parts of the names of faces
EVERY = ("",)
RULED = ("uided_backprop", "uidedBackprop", "uided_grad_cam", "uidedGradCam", "econv")  # those that follow a rule of ReLUs
SLOPES = (
    "xrai",
    "GuidedIG",
    "radient",
    "moothGrad",
    "smooth_grad",
    "Saliency",
    "NoiseTunnel",
    "Blur",
    "blur",
    "rad_cam",
    "radCam",
    "max_sensitivity",
    *RULED,
)
ABLATIONS = ("captum.FeatureAblation", "captum.Occlusion")
lstm = functools.partial(nn.LSTM, hidden_size=4)

NETWORKS: dict[str, Network] = {
    # the plain one, and other images
    "plain": Network(net()),
    "one image": Network(net(), shape=(1, 3, 6, 6)),
    "one row of two pixels": Network(net(), shape=(2, 3, 1, 2)),
    "one channel": Network(net(channels=1), shape=(3, 1, 5, 7)),
    "five channels": Network(net(channels=5), shape=(2, 5, 4, 6)),
    "as many images as classes": Network(net(), shape=(3, 3, 5, 4)),
    "a table": Network(Table, shape=(3, 1, 1, 6), layer=""),
    "float32": Network(net(), dtype=torch.float32),
    "bfloat16": Network(net(), dtype=torch.bfloat16),
    "float16": Network(net(), dtype=torch.float16),
    # sequences, sets, graphs
    "LSTM, batch first": Network(
        lambda: Sequence(functools.partial(lstm, batch_first=True), lambda body, x: body(x)[0][:, -1]), layer="", refuses=RULED
    ),
    "LSTM, time first": Network(
        lambda: Sequence(lstm, lambda body, x: body(x.transpose(0, 1))[0][-1]), layer="", refuses=RULED
    ),
    "LSTM that takes images for time": Network(
        lambda: Sequence(lstm, lambda body, x: body(x)[0][:, -1]), layer="", coupled=True, refuses=RULED
    ),
    "GRU, last state": Network(
        lambda: Sequence(lambda width: nn.GRU(width, 4, batch_first=True), lambda body, x: body(x)[1][-1]),
        layer="",
        refuses=RULED,
    ),
    "packed sequence": Network(
        lambda: Sequence(
            functools.partial(lstm, batch_first=True),
            lambda body, x: body(nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True))[1][0][-1],
        ),
        layer="",
        refuses=RULED,
    ),
    "transformer": Network(lambda: Attention(over_batch=False), layer="encoder.layers.0", unlike=("captum.LayerGradCam",)),
    "transformer, attention over the batch": Network(
        lambda: Attention(over_batch=True), layer="encoder.layers.0", unlike=("captum.LayerGradCam",), coupled=True
    ),
    "set attention": Network(net(outside=lambda _net, y: torch.softmax(y @ y.T, 1) @ y), coupled=True),
    "graph with a batch vector": Network(lambda: Graph(named_batch), layer="", coupled=True),
    # normalisation
    "batch norm without running statistics": Network(
        net(lambda _net, x: F.batch_norm(x, None, None, training=True)), coupled=True
    ),
    "instance norm": Network(net(lambda _net, x: F.instance_norm(x))),
    "group norm": Network(net(group(2))),
    "layer norm, channels last": Network(net(lambda net, x: net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))),
    "response norm": Network(net(lambda _net, x: F.local_response_norm(x, 2))),
    "divided by the largest of the batch": Network(net(lambda _net, x: x / x.amax()), coupled=True),
    # what acts on gradients
    "checkpoint": Network(
        net(lambda net, x: checkpoint(lambda y: F.relu(net.second(y)), x, use_reentrant=False)), refuses=RULED
    ),
    "reentrant checkpoint": Network(
        net(lambda net, x: checkpoint(lambda y: F.relu(net.second(y)), x, use_reentrant=True)),
        twin=net(lambda net, x: F.relu(net.second(x))),
        refuses=SLOPES,
    ),
    "no_grad in a branch": Network(net(under(torch.no_grad))),
    "gradients switched on": Network(net(switched_on), twin=Net),
    "inference mode in a branch": Network(net(under(torch.inference_mode)), twin=net(under(torch.no_grad)), refuses=SLOPES),
    "detached": Network(net(outside=lambda _net, y: y.detach()), refuses=SLOPES),
    "no_grad around all": Network(Ungraded, refuses=SLOPES),
    "detach": Network(net(lambda net, x: x * net.mix(x.detach().movedim(1, -1)).movedim(-1, 1))),
    "straight-through": Network(net(flows)),
    "gradient reversal": Network(net(lambda _net, x: Reversal.apply(x)), refuses=RULED),
    "a gradient inside": Network(net(outside=energy)),
    "made in inference mode": Network(made_in_inference_mode, twin=Net, refuses=SLOPES),
    # ways to run
    "vmap": Network(
        net(lambda net, x: torch.vmap(lambda one: F.relu(net.second(one)))(x)), twin=net(lambda net, x: F.relu(net.second(x)))
    ),
    "functional_call": Network(net(called)),
    "image by image": Network(net(lambda net, x: torch.stack([net.second(one[None])[0] for one in x])), refuses=("grad_cam",)),
    "sorted and back": Network(net(sorted_and_back)),
    "in another order": Network(net(outside=lambda _net, y: y.flip(0)), coupled=True),
    "views of two rows": Network(net(outside=lambda _net, y: y.view(2, 3)), shape=(2, 3, 4, 4), coupled=True),
    "in place on its input": Network(net(before=in_place)),
    "keeps its input": Network(net(before=keep)),
    "channels last inside": Network(net(lambda _net, x: x.contiguous(memory_format=torch.channels_last))),
    "autocast that is switched off inside": Network(net(under(lambda: torch.autocast("cpu", enabled=False)))),
    "Fourier transform": Network(net(lambda _net, x: torch.fft.fft2(1 + x).abs())),
    "complex weights": Network(net(lambda _net, x: (x * torch.exp(1j * x)).real)),
    "answers into one buffer": Network(net(outside=in_one_buffer), twin=Net),
    "counts its passes": Network(net(counted)),
    "dropout that is always on": Network(net(lambda _net, x: F.dropout(x, 0.5, training=True)), chance=True),
    "two streams": Network(Streams, layer="colour"),
    "siamese": Network(Siamese, layer="net.second"),
    "weights used three times": Network(Shared, layer="relu@2"),
    "spectral norm": Network(parametrized("spectral")),
    "weight norm": Network(parametrized("weight")),
    "hook on the way": Network(hooked("forward")),
    "hook before": Network(hooked("before")),
    "hook on the way back": Network(hooked("backward")),
    # wrappers
    "DataParallel": Network(wrapped(nn.DataParallel), twin=Net, layer="module.second"),
    "compiled": Network(wrapped(lambda made: torch.compile(made, backend="eager")), twin=Net),
    "script inside": Network(script_inside, twin=Scripted),
    "scripted": Network(lambda: torch.jit.script(seeded(Scripted)), twin=Scripted, layer=""),
    "frozen script": Network(lambda: torch.jit.freeze(torch.jit.script(seeded(Scripted))), twin=Scripted, layer=""),
    "traced": Network(
        wrapped(lambda made: torch.jit.trace(made, torch.rand(2, 3, 6, 6, dtype=torch.float64))), twin=Net, layer=""
    ),
    "exported": Network(wrapped(exported), twin=Net, layer=""),
    "exported to core operations": Network(wrapped(exported_to_core_operations), twin=Net, layer=""),
    "decides by sizes": Network(net(by_sizes)),
    "quantised as it runs": Network(
        quantised,
        twin=quantised,
        shape=(2, 1, 1, 6),
        dtype=torch.float32,
        layer="",
        coupled=True,
        exact=torch.float32,
        refuses=SLOPES,
        unlike=("pair.GuidedIG",),  # which hands on float64 as the original does: torch's own error
    ),
    "a function": Network(
        wrapped(lambda made: lambda images: made(images)), twin=Net, layer="", refuses=("captum.Guided", "captum.Deconv")
    ),
    "a method of an object": Network(
        wrapped(lambda made: made.forward), twin=Net, layer="", refuses=("captum.Guided", "captum.Deconv")
    ),
    # outputs
    "two heads": Network(
        net(outside=lambda net, y: (y, y[:, :2].square())), pick=lambda output: output[0][:, 1], refuses=("captum",)
    ),
    "two heads alike": Network(net(outside=lambda net, y: (y, y.square())), pick=lambda output: output[0][:, 1], refuses=EVERY),
    "a list": Network(net(outside=lambda net, y: [y, y[:, :2]]), pick=lambda output: output[0][:, 1], refuses=("captum",)),
    "named outputs": Network(
        net(outside=lambda net, y: {"logits": y, "other": -y}), pick=lambda output: output["logits"][:, 1], refuses=("captum",)
    ),
    "a named tuple": Network(
        net(outside=lambda net, y: Pair(y, y[:, :2])), pick=lambda output: output.scores[:, 1], refuses=("captum",)
    ),
    "a model's output object": Network(
        net(outside=lambda net, y: Output(logits=y, features=y)),
        pick=lambda output: output["logits"][:, 1],
        refuses=("captum",),
    ),
    "names that say nothing": Network(
        net(outside=lambda net, y: {"cat": y[:, 0], "dog": y[:, 1]}), pick=lambda output: output["dog"], refuses=EVERY
    ),
    "a callable target": Network(
        net(outside=lambda net, y: {"boxes": y.cumsum(1), "scores": y}),
        target=lambda output: output["boxes"][:, 2],
        pick=lambda output: output["boxes"][:, 2],
        refuses=("class_gradients", "captum.Guided", "captum.Deconv"),
    ),
    "a subclass of Tensor": Network(net(outside=lambda net, y: y.as_subclass(Kept)), pick=column(1), twin=Net),
    "whole numbers": Network(net(outside=lambda net, y: (10 * y).round().long()), refuses=EVERY),
    "the class alone": Network(net(outside=lambda net, y: y.argmax(1)), target=0, pick=lambda output: output, refuses=EVERY),
    "truth values": Network(net(outside=lambda net, y: y > 0), refuses=EVERY),
    "complex output": Network(net(outside=lambda net, y: torch.complex(y, y)), refuses=EVERY, unlike=("captum.Occlusion",)),
    "one number for each image": Network(
        net(outside=lambda net, y: y.squeeze(1), classes=1), target=0, pick=lambda output: output, numbers=True
    ),
    "squeezed": Network(
        net(outside=lambda net, y: y.squeeze(), classes=1), target=0, pick=lambda output: output.reshape(-1), numbers=True
    ),
    "one number for all": Network(
        net(outside=lambda net, y: y.mean()), target=0, pick=lambda output: output.reshape(1), coupled=True, refuses=EVERY
    ),
    "transposed": Network(net(outside=lambda net, y: y.T), coupled=True, unlike=ABLATIONS, refuses=EVERY),
    "transposed, as many images as classes": Network(net(outside=lambda net, y: y.T), shape=(3, 3, 5, 5), coupled=True),
    "maps of scores": Network(
        net(outside=lambda net, y: y[:, :, None, None].expand(-1, -1, 2, 2)), unlike=ABLATIONS, refuses=EVERY
    ),
    "one column": Network(net(classes=1), target=0),
    "sigmoid of one": Network(net(outside=lambda net, y: y.sigmoid(), classes=1), target=0),
    "sigmoid of labels": Network(net(outside=lambda net, y: y.sigmoid(), classes=7)),
    "softmax": Network(net(outside=lambda net, y: y.softmax(1))),
    "log_softmax": Network(net(outside=lambda net, y: y.log_softmax(1))),
    "impossible classes": Network(net(outside=lambda net, y: torch.cat([y, torch.full_like(y[:, :1], -torch.inf)], 1))),
    "bfloat16 answers": Network(net(outside=lambda net, y: y.bfloat16(), classes=3), dtype=torch.float32),
}


def user(network: Network) -> Any:
    """The network as its user holds it."""
    return seeded(network.build, network.dtype)


def plain(network: Network, dtype: torch.dtype) -> Any:
    """The same function in plain modules of a dtype."""
    made = seeded(network.twin or network.build, network.dtype)
    return copy.deepcopy(made).to(dtype) if isinstance(made, nn.Module) else made
