"""Generate the Python code of the protos, and their description in OpenAPI: `python protos/generate.py OUTPUT_FOLDER`.

The validation rules stay in the descriptors as bytes, but the generated code must not import `buf.validate`, which no
package ships: the dependency is dropped from the descriptors before the code is generated.
"""

import sys
import tempfile
from pathlib import Path

import grpc_tools
import openapi
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
VALIDATE = "buf/validate/validate.proto"


def generate(output: Path) -> None:
    """Write the generated packages `shardyard/v1` and `shardyard/worker/v1` under `output`."""
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    includes = [f"-I{ROOT}", f"-I{ROOT.parent / 'third_party'}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    with tempfile.TemporaryDirectory() as folder:
        descriptors = Path(folder) / "descriptors.binpb"
        run_protoc(
            *includes, "--include_imports", "--include_source_info", f"--descriptor_set_out={descriptors}", *files
        )
        descriptors.write_bytes(without_validate(descriptors.read_bytes()))
        described = openapi.describe(descriptors.read_bytes())
        services = [name for name in files if name.endswith("_service.proto")]
        source = f"--descriptor_set_in={descriptors}"
        run_protoc(source, f"--python_out={output}", f"--mypy_out={output}", *files)
        run_protoc(source, f"--grpc_python_out={output}", f"--mypy_grpc_out={output}", *services)
    (output / "shardyard" / "v1" / "openapi.json").write_text(f"{described}\n", encoding="utf-8")
    for package in {Path(name).parent for name in files}:
        name = str(package).replace("/", ".")
        (output / package / "__init__.py").write_text(
            f'"""Generated code of the protos `{name}`: never edited by hand."""\n'
        )
    (output / "shardyard" / "worker" / "__init__.py").write_text(
        '"""Private messages between coordinator and trainer."""\n'
    )


def run_protoc(*arguments: str) -> None:
    """Run the protoc of grpcio-tools; exits with its code if it fails."""
    if code := protoc.main(["protoc", *arguments]):
        sys.exit(code)


def without_validate(data: bytes) -> bytes:
    """The descriptor set with neither `validate.proto` nor any dependency on it."""
    files = descriptor_pb2.FileDescriptorSet.FromString(data)
    kept = descriptor_pb2.FileDescriptorSet()
    for file in files.file:
        if file.name == VALIDATE:
            continue
        dependencies = [name for name in file.dependency if name != VALIDATE]
        del file.dependency[:]
        file.dependency.extend(dependencies)
        kept.file.append(file)
    return kept.SerializeToString()


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
