"""Uploads that are sent once and continue where they stopped; downloads that are whole or absent."""

from __future__ import annotations

import subprocess
from contextlib import chdir
from pathlib import Path

import grpc
import pytest

from helpers.full_disk import small_disk
from helpers.script import Failure, Script
from helpers.scripted_service import serving
from shardyard import (
    AsyncClient,
    Client,
    Data,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    ShardyardError,
    TextClassification,
)
from shardyard._files import CHUNK_BYTES, package


def a_file(folder: Path, *, size: int = 3 * CHUNK_BYTES + 17) -> Path:
    path = folder / "reviews.csv"
    path.write_bytes(bytes(index % 251 for index in range(1000)) * (size // 1000 + 1))
    return path


def a_model(folder: Path) -> Path:
    model = folder / "bert"
    (model / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "sub/tokenizer.json", ".hidden"):
        (model / name).write_text(name)
    return model


def test_a_file_is_uploaded_under_an_id_made_from_its_content(tmp_path: Path) -> None:
    script, path = Script(), a_file(tmp_path)
    with serving(script) as address, Client(address) as client:
        data_set = client.upload_dataset(path)
    assert data_set.id == package(path, "datasets").resource_id
    assert data_set.id.startswith("d-") and len(data_set.id) == 34
    assert bytes(script.uploads[data_set.id]["reviews.csv"]) == path.read_bytes()


def test_the_same_content_is_sent_once(tmp_path: Path) -> None:
    script, path = Script(), a_file(tmp_path)
    with serving(script) as address, Client(address) as client:
        assert client.upload_dataset(path).name == client.upload_dataset(path).name
    assert len(script.asked("CreateDataset")) == 1


def test_an_upload_that_is_cut_continues_where_it_stopped(tmp_path: Path) -> None:
    script, path = Script(upload_cuts=[1, CHUNK_BYTES]), a_file(tmp_path)
    with serving(script) as address, Client(address) as client:
        data_set = client.upload_dataset(path)
    assert bytes(script.uploads[data_set.id]["reviews.csv"]) == path.read_bytes()
    headers = script.asked("CreateDataset")
    assert len(headers) == 3
    assert len({header.request_id for header in headers}) == 1


def test_another_process_continues_with_the_upload(tmp_path: Path) -> None:
    script, path = Script(upload_cuts=[1]), a_file(tmp_path)
    with serving(script) as address:
        with Client(address, reconnect_for=0) as client, pytest.raises(Exception, match="cut"):
            client.upload_dataset(path)
        with Client(address) as client:
            data_set = client.upload_dataset(path)
    assert bytes(script.uploads[data_set.id]["reviews.csv"]) == path.read_bytes()


async def test_the_async_client_uploads_a_model_folder_without_what_torch_does_not_read(tmp_path: Path) -> None:
    script = Script()
    with serving(script) as address:
        async with AsyncClient(address) as client:
            model = await client.upload_model(a_model(tmp_path))
    assert model.id.startswith("m-")
    assert sorted(script.uploads[model.id]) == ["config.json", "model.safetensors", "sub/tokenizer.json"]


def test_a_submitted_path_is_uploaded_and_named_in_the_spec(tmp_path: Path) -> None:
    script = Script()
    with serving(script) as address, Client(address) as client:
        client.submit(TextClassification(), model=a_model(tmp_path), train_data=Data(a_file(tmp_path), text="review"))
    spec = script.asked("CreateJob")[0].job.spec
    assert spec.model.model == f"projects/default/models/{package(tmp_path / 'bert', 'models').resource_id}"
    assert spec.train_data.dataset.startswith("projects/default/datasets/d-")
    assert spec.train_data.columns["text"] == "review"


def test_an_empty_folder_is_refused_before_any_call(tmp_path: Path) -> None:
    script = Script()
    with serving(script) as address, Client(address) as client, pytest.raises(InvalidArgument, match="has no files"):
        client.upload_dataset(tmp_path)
    assert script.requests == []


FILES = {"config.json": b"{}", "model.safetensors": b"0123456789abcdef", "sub/empty": b""}


def test_a_download_that_is_cut_continues_and_is_checked(tmp_path: Path) -> None:
    script = Script(ready={"m"}, files=FILES, download_cuts=[0, 8, 4])
    with serving(script) as address, Client(address) as client:
        folder = client.model("m").download(tmp_path / "model")
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == FILES
    assert not (tmp_path / "model.partial").exists()


def test_a_download_continues_in_another_process(tmp_path: Path) -> None:
    script = Script(ready={"m"}, files={"weights": b"0123456789abcdef"}, download_cuts=[8])
    with serving(script) as address:
        with Client(address, reconnect_for=0) as client, pytest.raises(Exception, match="cut"):
            client.model("m").download(tmp_path / "model")
        assert not (tmp_path / "model").exists()
        with Client(address) as client:
            client.model("m").download(tmp_path / "model")
    assert [request.offset for request in script.asked("DownloadModel")] == [0, 8]
    assert (tmp_path / "model/weights").read_bytes() == b"0123456789abcdef"


def test_what_is_already_there_is_not_fetched_again_but_what_differs_is(tmp_path: Path) -> None:
    script = Script(ready={"m"}, files=FILES)
    with serving(script) as address, Client(address) as client:
        client.model("m").download(tmp_path / "model")
        (tmp_path / "model/config.json").write_text("changed")
        client.model("m").download(tmp_path / "model")
    assert (tmp_path / "model/config.json").read_bytes() == b"{}"
    fetched = [request.path for request in script.asked("DownloadModel")]
    assert fetched.count("config.json") == 2 and fetched.count("model.safetensors") == 1


def test_an_empty_current_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    script = Script(ready={"m"}, files=FILES)
    with serving(script) as address, Client(address) as client, chdir(tmp_path / "here"):
        client.model("m").download(Path())
        client.model("m").download("./")
    assert (tmp_path / "here/sub/empty").read_bytes() == b""
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_root_and_a_file_are_refused_as_folders_to_download_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with serving(Script(ready={"m"}, files=FILES)) as address, Client(address) as client:
        with pytest.raises(InvalidArgument, match="give one below it"):
            client.model("m").download("/")
        with pytest.raises(InvalidArgument, match="is not a folder"):
            client.model("m").download(tmp_path / "file")


@pytest.mark.parametrize("place", ["model", "model.partial"])
def test_a_folder_with_files_of_another_model_is_refused_before_anything_is_fetched(place: str, tmp_path: Path) -> None:
    script = Script(ready={"m"}, files=FILES)
    (tmp_path / place).mkdir()
    (tmp_path / place / "head.safetensors").write_bytes(b"of another model")
    with serving(script) as address, Client(address) as client:
        with pytest.raises(InvalidArgument, match=r"head\.safetensors; download into another folder"):
            client.model("m").download(tmp_path / "model")
        assert script.asked("DownloadModel") == []
        (tmp_path / place / "head.safetensors").rename(tmp_path / place / ".notes")
        client.model("m").download(tmp_path / "model")


def test_a_full_disk_is_a_failure_of_the_sdk_and_the_download_continues_when_there_is_room(tmp_path: Path) -> None:
    files = {f"part-{number}": bytes(300_000) for number in range(4)}
    script = Script(ready={"m"}, files=files, chunk_bytes=50_000)
    with small_disk(tmp_path / "disk", 1) as disk, serving(script) as address:
        with Client(address) as client, pytest.raises(ShardyardError) as raised:
            client.model("m").download(disk / "model")
        assert isinstance(raised.value, FailedPrecondition) and raised.value.reason == "LOCAL_FILE"
        assert str(disk / "model") in raised.value.message and "free some space" in raised.value.message
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        with Client(address) as client:
            client.model("m").download(disk / "model")
        assert {path.name: path.read_bytes() for path in (disk / "model").iterdir()} == files


async def test_a_place_that_no_download_can_be_put_in_is_a_failure_of_the_sdk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serving(Script(ready={"m"}, files=FILES)) as address:
        async with AsyncClient(address) as client:
            for resource in (await client.model("m"), await client.dataset("m")):
                with pytest.raises(FailedPrecondition, match=r"file.*Not a directory; choose another place"):
                    await resource.download(tmp_path / "file" / "below")


def test_a_damaged_chunk_is_fetched_again(tmp_path: Path) -> None:
    script = Script(ready={"m"}, files=FILES, corrupt_downloads=1)
    with serving(script) as address, Client(address) as client:
        folder = client.model("m").download(tmp_path / "model")
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_an_early_ok_is_not_believed_and_a_copy_that_stays_short_is_named(tmp_path: Path) -> None:
    script = Script(ready={"m"}, files=dict(FILES), announced={"model.safetensors": FILES["model.safetensors"] * 2})
    with serving(script) as address, Client(address) as client:
        with pytest.raises(DataLoss, match="the service's own copy is damaged") as error:
            client.model("m").download(tmp_path / "model")
        assert error.value.reason == "FILE_DAMAGED" and "first 16" in str(error.value)
    assert not (tmp_path / "model").exists()
    assert [request.offset for request in script.asked("DownloadModel") if request.path == "model.safetensors"] == [
        0,
        16,
    ]


def test_a_copy_that_is_longer_than_announced_is_named_and_not_written_on_and_on(tmp_path: Path) -> None:
    script = Script(ready={"m"}, files={"weights": b"0123456789" * 1000}, announced={"weights": b"0123456"})
    with serving(script) as address, Client(address) as client:
        with pytest.raises(DataLoss, match=r"the service's own copy is damaged.*more than the 7 bytes") as error:
            client.model("m").download(tmp_path / "model")
        assert error.value.reason == "FILE_DAMAGED"
    assert [path for path in (tmp_path / "model.partial").rglob("*") if path.is_file()] == []


def test_a_copy_with_another_sha256_is_the_services_unless_a_part_of_it_was_here(tmp_path: Path) -> None:
    script = Script(ready={"m"}, files={"weights": b"0123456789"}, announced={"weights": b"0123456780"})
    with serving(script) as address, Client(address) as client, pytest.raises(DataLoss) as error:
        client.model("m").download(tmp_path / "model")
    assert error.value.reason == "FILE_DAMAGED"

    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial/weights.part").write_bytes(b"damaged")
    script = Script(ready={"m"}, files={"weights": b"0123456789"})
    with serving(script) as address, Client(address) as client:
        folder = client.model("m").download(tmp_path / "other")
    assert (folder / "weights").read_bytes() == b"0123456789"
    assert [request.offset for request in script.asked("DownloadModel")] == [7, 0]


def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    script = Script(ready={"m"}, files={"../evil": b"x"})
    with serving(script) as address, Client(address) as client, pytest.raises(DataLoss, match="outside the folder"):
        client.model("m").download(tmp_path / "model")
    assert not (tmp_path / "evil").exists()


def test_a_file_that_changes_while_it_is_sent_is_refused_and_not_tried_for_ever(tmp_path: Path) -> None:
    script, path = Script(upload_cuts=[1]), a_file(tmp_path)
    script.on_upload_cut = lambda: path.write_bytes(b"shorter")
    with serving(script) as address, Client(address) as client, pytest.raises(InvalidArgument, match="has changed"):
        client.upload_dataset(path)


def test_an_upload_that_another_one_overtook_continues_from_what_has_arrived(tmp_path: Path) -> None:
    overtaken = Failure(grpc.StatusCode.INVALID_ARGUMENT, "UPLOAD_MISMATCH")
    script, path = Script(failures={"CreateDataset": [overtaken]}), a_file(tmp_path)
    with serving(script) as address, Client(address) as client:
        data_set = client.upload_dataset(path)
    assert bytes(script.uploads[data_set.id]["reviews.csv"]) == path.read_bytes()
    script = Script(failures={"CreateDataset": [overtaken, overtaken]})
    with serving(script) as address, Client(address) as client, pytest.raises(InvalidArgument) as error:
        client.upload_dataset(path)
    assert error.value.reason == "UPLOAD_MISMATCH"


def test_unfinished_uploads_are_asked_for(tmp_path: Path) -> None:
    script = Script(ready={"m"})
    with serving(script) as address, Client(address) as client:
        list(client.models(show_uploading=True))
        list(client.datasets(show_uploading=True))
        list(client.datasets())
    assert [request.show_uploading for request in script.asked("ListModels")] == [True]
    assert [request.show_uploading for request in script.asked("ListDatasets")] == [True, False]
