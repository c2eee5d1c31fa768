"""Writes a `Small` network as an ONNX file, node by node."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.models.networks import Small


def write(model: Small, path: Path, *, batch: int | str = "N", side: int | str = "H", extra: str | None = None) -> Path:
    """Write it, for a fixed or any number of images and size; `extra` is an operator on the logits, of a domain of its own."""
    norm = model.norm
    tensors = {
        "first.weight": model.first.weight,
        "first.bias": model.first.bias,
        "norm.weight": norm.weight,
        "norm.bias": norm.bias,
        "norm.mean": norm.running_mean,
        "norm.var": norm.running_var,
        "second.weight": model.second.weight,
        "second.bias": model.second.bias,
        "head.weight": model.head.weight,
        "head.bias": model.head.bias,
    }
    constants = [numpy_helper.from_array(value.detach().numpy().astype(np.float32), name) for name, value in tensors.items()]
    nodes = [
        helper.make_node("Conv", ["images", "first.weight", "first.bias"], ["a"], strides=[2, 2], kernel_shape=[3, 3]),
        helper.make_node(
            "BatchNormalization", ["a", "norm.weight", "norm.bias", "norm.mean", "norm.var"], ["b"], epsilon=norm.eps
        ),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "second.weight", "second.bias"], ["d"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "head.weight", "head.bias"], ["logits"], transB=1),
    ]
    last = "logits"
    if extra is not None:
        nodes.append(helper.make_node(extra, ["logits"], ["more"]))
        last = "more"
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, side, side])
    logits = helper.make_tensor_value_info(last, TensorProto.FLOAT, [batch, model.head.out_features])
    graph = helper.make_graph(nodes, "small", [image], [logits], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
