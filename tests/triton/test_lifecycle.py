"""Loading, unloading and stopping: clear errors, and nothing left behind."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pagedcore.serve.triton_server import TritonServer
from tests.serve.processes import assert_nothing_is_left, processes_with
from tests.triton.clients import MODEL, Answer, generate, grpc_stream, metrics_text, responses_of, wait_until
from tests.triton.repository import ENGINE_ARGUMENTS, write_arguments, write_repository

_INTEGER_PROMPT = 'input [{ name: "text_input" data_type: TYPE_INT32 dims: [1] }]'


@pytest.fixture(scope="module")
def explicit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server on which models are loaded and unloaded by its API; none is loaded at first."""
    folder = tmp_path_factory.mktemp("explicit")
    repository = write_repository(folder)
    arguments = ["--model-control-mode=explicit"]
    with TritonServer(
        repository, log_path=folder / "tritonserver.log", exit_timeout=5, extra_args=arguments
    ) as running:
        yield running


def control(server: TritonServer, action: str, model: str = MODEL) -> str | None:
    """Load or unload a model; returns the error, if there is one."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    try:
        connection.request("POST", f"/v2/repository/models/{model}/{action}", "{}")
        response = connection.getresponse()
        content = response.read().decode()
    finally:
        connection.close()
    return None if response.status == 200 else str(json.loads(content)["error"])


def is_loaded(server: TritonServer) -> bool:
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    try:
        connection.request("GET", f"/v2/models/{MODEL}/ready")
        return connection.getresponse().status == 200
    finally:
        connection.close()


def stubs(server: TritonServer) -> set[int]:
    """Ids of the processes of the server's models."""
    return set(processes_with(server.shm_prefix)) & set(processes_with("triton_python_backend_stub"))


def model_json(content: str) -> Callable[[Path], object]:
    return lambda model: (model / "1" / "model.json").write_text(content)


def config_pbtxt(old: str, new: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        path = model / "config.pbtxt"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            model_json('{"model": "default", "max_sequences": 4}'),
            "unknown engine argument 'max_sequences'.*max_num_seqs",
        ),
        (model_json('{"model": "/nowhere"}'), "/nowhere"),
        (model_json('{"model": "default", "dtype": "int3"}'), "dtype must be one of"),
        (model_json('{"model": "default", "seed": 1, "seed": 2}'), "must not repeat a key, got 'seed' 2 times"),
        (model_json('{"model": "default", "skip_tokenizer_init": true}'), "skip_tokenizer_init must be false"),
        (model_json("{"), "must be a JSON object"),
        (lambda model: (model / "1" / "model.json").unlink(), "model.json"),
        (config_pbtxt("count: 1", "count: 2"), "instance_group must have 1 instance.*got 2"),
        (
            config_pbtxt("KIND_MODEL", "KIND_GPU gpus: [7]"),
            "instance group llm_0 of model llm specifies invalid.*gpu id 7",
        ),
        (
            config_pbtxt(
                "parameters {", 'parameters { key: "GPU_DEVICE_IDS" value { string_value: "7" } }\nparameters {'
            ),
            r"there is no NVIDIA GPU|device_index must be in \[0",
        ),
        (config_pbtxt("max_batch_size: 0", "max_batch_size: 8"), "max_batch_size"),
        (config_pbtxt("max_batch_size: 0", f"max_batch_size: 0 {_INTEGER_PROMPT}"), "text_input"),
    ],
)
def test_a_model_that_cannot_be_served_fails_to_load(
    explicit: TritonServer, change: Callable[[Path], object], reason: str
) -> None:
    model = explicit.model_repository / MODEL
    saved = {path: path.read_text() for path in (model / "config.pbtxt", model / "1" / "model.json")}
    try:
        change(model)
        error = control(explicit, "load")
    finally:
        for path, text in saved.items():
            path.write_text(text)
    assert error is not None
    assert re.search(reason, error, re.DOTALL), error
    assert "Traceback" not in error
    assert not is_loaded(explicit)


@pytest.mark.parametrize(
    "change",
    [
        config_pbtxt('parameters {\n  key: "REPORT_CUSTOM_METRICS"\n  value { string_value: "true" }\n}\n', ""),
        lambda model: write_arguments(model.parent, disable_log_stats=True),
    ],
)
def test_without_metrics_not_a_line_is_shown(explicit: TritonServer, change: Callable[[Path], object]) -> None:
    """Either of vllm_backend's switches is enough."""
    model = explicit.model_repository / MODEL
    saved = {path: path.read_text() for path in (model / "config.pbtxt", model / "1" / "model.json")}
    try:
        change(model)
        assert control(explicit, "load") is None
        inputs = {"text_input": "Once upon a time", "sampling_parameters": '{"temperature": 0, "max_tokens": 4}'}
        assert generate(explicit.http_url, inputs).error is None
        assert (
            re.findall("^.*(?:vllm:|pagedcore:|nv_trt_llm).*$", metrics_text(explicit.metrics_url), re.MULTILINE) == []
        )
        assert control(explicit, "unload") is None
    finally:
        for path, text in saved.items():
            path.write_text(text)


def test_unloading_and_loading_again(explicit: TritonServer) -> None:
    """With a stream and a queued request still open, which end first."""
    inputs = {"text_input": "Once upon a time", "sampling_parameters": '{"temperature": 0, "max_tokens": 40}'}
    write_arguments(explicit.model_repository, max_num_seqs=1)
    assert control(explicit, "load") is None
    before = generate(explicit.http_url, inputs).text
    with grpc_stream(explicit.grpc_url) as stream:
        for request_id in ("a", "b"):
            stream.send({**inputs, "stream": True}, request_id=request_id)
        stream.next()
        assert control(explicit, "unload") is None
        finals = 0
        while finals < 2:
            finals += stream.next()[2]
    wait_until(lambda: not is_loaded(explicit))
    assert control(explicit, "load") is None
    assert generate(explicit.http_url, inputs).text == before
    assert control(explicit, "unload") is None
    wait_until(lambda: not stubs(explicit))
    wait_until(lambda: "kv_blocks" not in metrics_text(explicit.metrics_url))


def test_a_loaded_model_is_loaded_anew_with_other_arguments(explicit: TritonServer) -> None:
    """The new one begins before the old one has ended; their metrics have the same labels."""
    inputs = {"text_input": "one two three", "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": 4})}
    counted = re.compile(r"^vllm:generation_tokens_total\{.*\} [1-9]", re.MULTILINE)  # by the new one
    texts = set()
    for max_num_seqs in (2, 3, 4):
        write_arguments(explicit.model_repository, max_num_seqs=max_num_seqs)
        assert control(explicit, "load") is None
        wait_until(lambda: len(stubs(explicit)) == 1)  # the old one has ended
        answer = generate(explicit.http_url, inputs)
        assert answer.error is None
        texts.add(answer.text)
        wait_until(lambda: counted.search(metrics_text(explicit.metrics_url)) is not None)
        for _ in range(3):
            assert generate(explicit.http_url, inputs).error is None
    assert len(texts) == 1
    assert control(explicit, "unload") is None
    wait_until(lambda: not stubs(explicit))


def test_streams_outlast_the_loading_of_other_arguments(explicit: TritonServer) -> None:
    """The model in use goes on with what it has; requests that come later are the new one's."""
    inputs = {"text_input": "one two three four five " * 4}
    sampling = {"temperature": 0, "max_tokens": 150, "ignore_eos": True}
    write_arguments(explicit.model_repository, max_num_seqs=8)
    assert control(explicit, "load") is None
    with grpc_stream(explicit.grpc_url) as stream:
        stream.send({**inputs, "stream": True, "sampling_parameters": json.dumps(sampling)})
        stream.next()
        write_arguments(explicit.model_repository, max_model_len=16)
        assert control(explicit, "load") is None
        responses = 1
        while not stream.next()[2]:
            responses += 1
        assert responses == 149
    error = generate(explicit.http_url, {**inputs, "sampling_parameters": json.dumps(sampling)}).error
    assert error is not None and "the prompt has" in error and "16" in error
    write_arguments(explicit.model_repository, dtype="int3")
    assert "dtype must be one of" in str(control(explicit, "load"))  # then the one that is loaded stays
    assert generate(explicit.http_url, {"text_input": "one", "sampling_parameters": '{"max_tokens": 2}'}).error is None
    write_arguments(explicit.model_repository)
    assert control(explicit, "unload") is None
    wait_until(lambda: not stubs(explicit))


def test_loading_and_unloading_while_requests_come(explicit: TritonServer) -> None:
    """Each is answered whole, or with an error that says that there is no model; none is lost."""
    sampling = json.dumps({"temperature": 0, "max_tokens": 6, "ignore_eos": True})
    assert control(explicit, "load") is None
    whole = generate(explicit.http_url, {"text_input": "one two", "sampling_parameters": sampling}).text
    ending = threading.Event()
    answers: list[Answer] = []

    def ask() -> None:
        while not ending.is_set():
            answers.append(generate(explicit.http_url, {"text_input": "one two", "sampling_parameters": sampling}))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    for action in ("unload", "load", "unload", "load"):
        assert control(explicit, action) is None
        seen = len(answers)
        wait_until(lambda seen=seen: len(answers) > seen + 8)  # type: ignore[misc]
    ending.set()
    for client in clients:
        client.join()
    texts = {answer.text for answer in answers if answer.error is None}
    assert texts == {whole}
    errors = {answer.error for answer in answers if answer.error is not None}
    assert errors and all("llm" in error and "model" in error for error in errors), errors
    assert control(explicit, "unload") is None
    wait_until(lambda: not stubs(explicit))


def test_two_models_serve_side_by_side(explicit: TritonServer) -> None:
    """Each has its own engine, arguments and metrics; one goes, the other stays."""
    other = explicit.model_repository / "other"
    shutil.copytree(explicit.model_repository / MODEL, other)
    (other / "1" / "model.json").write_text(json.dumps(ENGINE_ARGUMENTS | {"num_gpu_blocks_override": 77}))
    write_arguments(explicit.model_repository, num_gpu_blocks_override=55)
    inputs = {"text_input": "one two three", "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": 4})}

    def blocks() -> dict[str, str]:
        found = re.findall(r'^pagedcore:kv_blocks_total\{model="(\w+)",version="1"\} (\d+)$', metrics(), re.MULTILINE)
        return dict(found)

    def metrics() -> str:
        return metrics_text(explicit.metrics_url)

    try:
        for model in (MODEL, "other"):
            assert control(explicit, "load", model) is None
        wait_until(lambda: blocks() == {MODEL: "55", "other": "77"})
        texts = [
            "".join(
                text
                for response in responses_of(explicit.grpc_url, inputs, model=model)
                for text in response.values["text_output"]
            )
            for model in (MODEL, "other")
        ]
        assert texts[0] == texts[1]
        assert control(explicit, "unload") is None
        wait_until(lambda: blocks() == {"other": "77"})
        assert responses_of(explicit.grpc_url, inputs, model="other")[-1].final
    finally:
        for model in (MODEL, "other"):
            control(explicit, "unload", model)
        wait_until(lambda: not stubs(explicit))
        shutil.rmtree(other)


# As Triton starts them on two GPUs; the engines run on the processor all the same.
_TWO_INSTANCES = """
import json
from pagedcore_triton import model

class TritonPythonModel(model.TritonPythonModel):
    def initialize(self, args):
        config = json.loads(args["model_config"])
        config["instance_group"] = [{"kind": "KIND_GPU", "count": 1, "gpus": [0, 1]}]
        super().initialize({**args, "model_config": json.dumps(config)})
"""


def test_two_instances_of_a_model_share_its_requests_and_have_metrics_of_their_own(explicit: TritonServer) -> None:
    model = explicit.model_repository / MODEL
    saved = {path: path.read_text() for path in (model / "config.pbtxt", model / "1" / "model.py")}
    inputs = {"text_input": "one two three", "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": 4})}
    try:
        config_pbtxt("count: 1", "count: 2")(model)
        (model / "1" / "model.py").write_text(_TWO_INSTANCES)
        write_arguments(explicit.model_repository, num_gpu_blocks_override=55)
        assert control(explicit, "load") is None
        assert len(stubs(explicit)) == 2
        lines = r'^pagedcore:kv_blocks_total\{instance="(\w+)",model="llm",version="1"\} 55$'
        served = r'^vllm:generation_tokens_total\{instance="(\w+)",model="llm",version="1"\} [1-9]'
        instances = {"llm_0_0", "llm_0_1"}
        wait_until(lambda: set(re.findall(lines, metrics_text(explicit.metrics_url), re.MULTILINE)) == instances)

        def both_have_served() -> bool:
            assert generate(explicit.http_url, inputs).error is None
            return set(re.findall(served, metrics_text(explicit.metrics_url), re.MULTILINE)) == instances

        wait_until(both_have_served)
        assert control(explicit, "unload") is None
        wait_until(lambda: "kv_blocks" not in metrics_text(explicit.metrics_url))
    finally:
        for path, text in saved.items():
            path.write_text(text)
    wait_until(lambda: not stubs(explicit))


def test_stopping_with_an_idle_stream_open_leaves_nothing(tmp_path: Path) -> None:
    """Triton keeps the model of a stream that has served a request until the stream is closed, and would not end."""
    with TritonServer(write_repository(tmp_path), log_path=tmp_path / "log", exit_timeout=2) as server:
        with grpc_stream(server.grpc_url) as stream:
            stream.send({"text_input": "Once", "stream": True, "sampling_parameters": '{"max_tokens": 2}'})
            while not stream.next()[2]:
                pass
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            wait_until(lambda: not processes_with(server.shm_prefix))
            stopping.join()
        assert_nothing_is_left(server.shm_prefix)


def test_stopping_the_server_lets_open_streams_finish(tmp_path: Path) -> None:
    """Then nothing of it is left. This server has no metrics, which hinders nothing."""
    server = TritonServer(
        write_repository(tmp_path),
        log_path=tmp_path / "log",
        extra_args=["--allow-metrics=false"],
    )
    server.start()
    server.wait_until_ready(120)
    assert stubs(server)
    with grpc_stream(server.grpc_url) as stream:
        stream.send(
            {"text_input": "Once", "stream": True, "sampling_parameters": '{"max_tokens": 30, "ignore_eos": true}'}
        )
        stream.next()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        responses = 1
        while not stream.next()[2]:
            responses += 1
        assert responses == 29
    stopping.join()  # only now, as an open gRPC stream that has served a request keeps Triton from unloading its model
    assert "successfully unloaded 'llm'" in server.log_path.read_text()
    assert_nothing_is_left(server.shm_prefix)
