#!/usr/bin/env bash
# onnxruntime's static quantisation forgets most calibration images where CalibMaxIntermediateOutputs is set.
#
# The option says how many images' intermediate values are held before their smallest and largest are taken, and is
# documented to give the same result as without it, in less memory. What is held is thrown away at every such number of
# images without being looked at; the ranges are those of the images after the last full portion. Scales are then too
# small for what was calibrated with, and larger values are cut off, with no error and no warning.
#
# Guess before the run: the same scales with and without the option, as documented.
# Seen with onnxruntime 1.31.1: three images whose largest values are 100, 10 and 1. Without the option the input's
# scale is 100/255, with a portion of 2 it is 1/255; the quantised graph answers 1 for a pixel of 50.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install onnxruntime==1.31.1 onnx==1.23.2 "numpy<3"
cat > "$work/compare.py" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

folder = Path(sys.argv[1])
shape = [1, 1, 4, 4]
weight = onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "weight")
graph = onnx.helper.make_graph(
    [onnx.helper.make_node("Conv", ["image", "weight"], ["map"])],
    "copy",
    [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)],
    [onnx.helper.make_tensor_value_info("map", onnx.TensorProto.FLOAT, shape)],
    [weight],
)
model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
onnx.save(model, folder / "float.onnx")


class Images(CalibrationDataReader):
    """Three images, each a ramp from 0 to its largest value."""

    def __init__(self):
        ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(shape)
        self.images = iter([{"image": ramp * most} for most in (100.0, 10.0, 1.0)])

    def get_next(self):
        return next(self.images, None)


def quantised(name, **options):
    path = folder / name
    quantize_static(folder / "float.onnx", path, Images(), quant_format=QuantFormat.QDQ, extra_options=options)
    values = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    image = np.full(shape, 50.0, np.float32)
    answer = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]
    return float(values["image_scale"]), float(answer.max())


whole, portions = quantised("whole.onnx"), quantised("portions.onnx", CalibMaxIntermediateOutputs=2)
print(f"onnxruntime {onnxruntime.__version__}: largest calibrated value 100, a pixel of 50 is asked")
for words, (scale, answer) in (("without the option", whole), ("portions of 2", portions)):
    print(f"{words}: scale {scale:.5f}, so at most {255 * scale:.1f}; the graph answers {answer:.2f}")
sys.exit(0 if abs(whole[1] - 50) < 1 and portions[1] < 2 else 1)
PYTHON
"$work/env/bin/python" "$work/compare.py" "$work" 2>/dev/null
