"""TuningService: data sets with every bad line named, jobs to their end, events that can be resumed."""

from __future__ import annotations

import asyncio
import math

import grpc
import pytest
from google.protobuf import json_format, struct_pb2
from tests.server.front.rpc.tuning_harness import ROWS, STATE, create, job_of, upload, validate, watch
from tests.waiting import until

from graftwork.v1 import adapters_pb2, generation_pb2
from graftwork.v1 import tuning_pb2 as pb

# ---------------------------------------------------------------------------------------------- data sets


async def test_a_data_set_is_stored_once_by_its_content(server):
    first = (await upload(server, display_name="rows.jsonl", size_bytes=len(ROWS))).dataset
    assert first.name == f"datasets/{first.dataset_id}"
    assert (first.format, first.row_count, first.size_bytes) == (pb.DATASET_FORMAT_PROMPT_COMPLETION, 10, len(ROWS))
    again = (await upload(server, display_name="other name")).dataset
    assert again == first
    assert len(list((server.data / "datasets").iterdir())) == 1
    assert list((server.data / "staging").iterdir()) == []


async def test_every_bad_line_is_named(shared, refused):
    lines = ROWS.splitlines()
    lines[2], lines[5] = b"{not json", b'{"prompt": "x"}'
    error = await refused(upload(shared, b"\n".join(lines)))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "DATASET_INVALID")
    assert set(error.fields) == {"line 3", "line 6"}
    assert error.message.startswith("the data set cannot be trained on: 2 problems; the first: line 3: ")
    assert list((shared.data / "staging").iterdir()) == []


async def test_ten_bad_lines_are_told_whole_and_the_rest_by_kind(shared, refused):
    long = b'{"prompt": "a", "completion": "b", "text": "c", "messages": "' + b"d" * 900 + b'"}\n'
    error = await refused(upload(shared, ROWS + long * 250))
    assert list(error.fields)[:10] == [f"line {number}" for number in range(11, 21)]
    assert list(error.fields)[10:] == ["240 more, the first in line 21"]
    assert len(set(error.fields.values())) == 1
    assert all(reason.endswith('or {"text"}') for reason in error.fields.values())  # to its end
    error = await refused(upload(shared, ROWS + b"{oh no\n" * 250))
    assert error.metadata["error_count"] == "250"
    report = await validate(shared, ROWS + b"{oh no\n" * 250)
    assert (len(report.errors), report.error_count, report.row_count, report.valid) == (100, 250, 10, False)
    assert report.errors[0].line == 11


async def test_a_report_says_what_training_would_see(shared):
    report = await validate(shared, ROWS)
    assert report.valid
    assert report.format == pb.DATASET_FORMAT_PROMPT_COMPLETION
    assert report.row_count == 10
    # "cN" and the end of sequence carry loss.
    assert report.loss_tokens == 30
    assert report.longest_row_tokens == 5
    cut = await validate(shared, ROWS, max_sequence_tokens=4)
    assert (cut.cut_rows, cut.total_tokens) == (10, 40)


async def test_a_stored_data_set_can_be_validated(server, refused):
    name = (await upload(server)).dataset.name
    assert (await validate(server, dataset=name)).valid
    assert (await refused(validate(server, dataset="datasets/ds-none"))).code == "NOT_FOUND"


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda s: s.tuning.UploadDataset(iter([])), "upload"),
        (lambda s: s.tuning.UploadDataset(iter([pb.UploadDatasetRequest(data=b"x")])), "upload"),
        (lambda s: s.tuning.UploadDataset(iter([pb.UploadDatasetRequest(upload=pb.DatasetUpload())] * 2)), "payload"),
        (lambda s: upload(s, b""), "data"),
        (lambda s: upload(s, display_name="x" * 201), "upload.display_name"),
        (lambda s: upload(s, display_name="a\nb"), "upload.display_name"),
        (lambda s: upload(s, size_bytes=-1), "upload.size_bytes"),
        (lambda s: upload(s, size_bytes=len(ROWS) + 1), "data"),
        (lambda s: upload(s, size_bytes=len(ROWS) - 1), "data"),
        (lambda s: upload(s, b"x" * ((1 << 20) + 1), piece=1 << 21), "data"),
        (lambda s: validate(s, ROWS, max_sequence_tokens=-1), "check.max_sequence_tokens"),
        (lambda s: validate(s, ROWS, max_sequence_tokens=129), "check.max_sequence_tokens"),
        (lambda s: validate(s, dataset="../x"), "check.dataset"),
    ],
)
async def test_a_wrong_upload_is_named(shared, refused, make, field):
    error = await refused(make(shared))
    assert error.code == "INVALID_ARGUMENT", error
    assert field in error.fields, error
    await until(lambda: list((shared.data / "staging").iterdir()) == [])


async def test_too_large_a_data_set_is_refused(make_server, refused):
    server = await make_server(max_dataset_bytes=100)
    error = await refused(upload(server))
    assert "100" in error.fields["data"]


# ---------------------------------------------------------------------------------------------- jobs


async def test_a_job_ends_in_an_adapter_that_answers(server):
    job = await create(server, load=True, config={"rank": 4, "learning_rate": 0.5}, validation_fraction=0.2)
    assert job.state == STATE.TUNING_JOB_STATE_PENDING
    assert dict(job.spec.config) == {"rank": 4, "learning_rate": 0.5, "epochs": 1}
    assert job.estimate.trained_parameters == 64
    assert [(choice.key, choice.automatic) for choice in job.choices] == [
        ("validation_fraction", False),
        ("learning_rate", False),
        ("rank", True),
        ("names", True),
    ]
    assert [json_format.MessageToDict(choice.value) for choice in job.choices] == [0.2, 0.5, 8, ["a"]]
    assert job.choices[2].reason == "2 rows are held out"
    assert (await job_of(server, job.name)).choices == job.choices
    events = await watch(server, job.name)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    states = [event.state for event in events if event.WhichOneof("event") == "state"]
    assert states[0] == STATE.TUNING_JOB_STATE_PENDING
    assert states[-1] == STATE.TUNING_JOB_STATE_SUCCEEDED
    assert [e.progress.step for e in events if e.WhichOneof("event") == "progress"] == [1, 2, 3]
    assert [e.evaluation.loss for e in events if e.WhichOneof("event") == "evaluation"] == [0.75]
    assert [e.checkpoint_step for e in events if e.WhichOneof("event") == "checkpoint_step"] == [3]
    assert "all well" in [e.message for e in events if e.WhichOneof("event") == "message"]

    done = await job_of(server, job.name)
    assert done.state == STATE.TUNING_JOB_STATE_SUCCEEDED
    assert done.result.adapter_version == "adapters/tuned/versions/1"
    assert (done.result.final_loss, done.result.validation_loss) == (0.7, 0.75)
    assert done.progress.step == 3
    assert done.end_time.ToDatetime() >= done.start_time.ToDatetime() >= done.create_time.ToDatetime()
    adapter = (await server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="adapters/tuned"))).adapter
    assert adapter.tuning_job == job.name
    call = server.generation.Generate(generation_pb2.GenerateRequest(model="tuned", text="x"))
    assert (await call.read()).version == 1


async def test_data_sets_are_listed_newest_first_and_deleted(server, refused):
    stored = [(await upload(server, ROWS + b'{"prompt": "%d", "completion": "c"}' % n)).dataset for n in range(3)]
    first = await server.tuning.ListDatasets(pb.ListDatasetsRequest(page_size=2))
    second = await server.tuning.ListDatasets(pb.ListDatasetsRequest(page_size=2, page_token=first.next_page_token))
    assert [*first.datasets, *second.datasets] == list(reversed(stored))
    assert second.next_page_token == ""
    assert (await server.tuning.GetDataset(pb.GetDatasetRequest(name=stored[0].name))).dataset == stored[0]
    lines = server.data / "datasets" / f"{stored[0].dataset_id}.jsonl"
    assert lines.exists()
    await server.tuning.DeleteDataset(pb.DeleteDatasetRequest(name=stored[0].name))
    assert not lines.exists()
    for call in (
        server.tuning.GetDataset(pb.GetDatasetRequest(name=stored[0].name)),
        server.tuning.DeleteDataset(pb.DeleteDatasetRequest(name=stored[0].name)),
        create(server, dataset=stored[0].name),
    ):
        assert (await refused(call)).reason == "DATASET_NOT_FOUND"
    assert (await upload(server, ROWS + b'{"prompt": "0", "completion": "c"}')).dataset.name == stored[0].name
    assert lines.exists()


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
async def test_what_a_job_needs_is_not_deleted(make_server, refused, field):
    server = await make_server(options={"job_steps": 1000})
    dataset = (await upload(server, ROWS * 2)).dataset.name
    job = await create(server, **{field: dataset})
    error = await refused(server.tuning.DeleteDataset(pb.DeleteDatasetRequest(name=dataset)))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "DATASET_IN_USE")
    assert job.job_id in error.message
    error = await refused(server.tuning.DeleteTuningJob(pb.DeleteTuningJobRequest(name=job.name)))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "JOB_NOT_ENDED")
    await server.tuning.CancelTuningJob(pb.CancelTuningJobRequest(name=job.name))
    await server.tuning.DeleteDataset(pb.DeleteDatasetRequest(name=dataset))


async def test_a_deleted_job_leaves_its_version(server, refused):
    job = await create(server)
    await watch(server, job.name)
    await server.tuning.DeleteTuningJob(pb.DeleteTuningJobRequest(name=job.name))
    for call in (
        server.tuning.GetTuningJob(pb.GetTuningJobRequest(name=job.name)),
        server.tuning.WatchTuningJob(pb.WatchTuningJobRequest(name=job.name)),
        server.tuning.DeleteTuningJob(pb.DeleteTuningJobRequest(name=job.name)),
    ):
        assert (await refused(call)).reason == "JOB_NOT_FOUND"
    assert not (await server.tuning.ListTuningJobs(pb.ListTuningJobsRequest())).jobs
    adapter = (await server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="adapters/tuned"))).adapter
    assert adapter.tuning_job == job.name


async def test_events_can_be_resumed(server):
    job = await create(server)
    events = await watch(server, job.name)
    assert await watch(server, job.name, after=3) == events[3:]
    assert await watch(server, job.name, after=10_000) == []


async def test_jobs_are_listed_newest_first(server):
    jobs = [await create(server, f"a{n}") for n in range(3)]
    first = await server.tuning.ListTuningJobs(pb.ListTuningJobsRequest(page_size=2))
    second = await server.tuning.ListTuningJobs(pb.ListTuningJobsRequest(page_size=2, page_token=first.next_page_token))
    assert [job.name for job in [*first.jobs, *second.jobs]] == [job.name for job in reversed(jobs)]


async def test_a_job_is_checked_before_its_data_is_there(server, refused):
    def check(**fields):
        spec = pb.TuningJobSpec(**{"strategy": "lora", "adapter_id": "a", **fields})
        return server.tuning.CreateTuningJob(pb.CreateTuningJobRequest(spec=spec, validate_only=True))

    assert (await check()).job.name == ""
    assert not (await server.tuning.ListTuningJobs(pb.ListTuningJobsRequest())).jobs
    for fields, reason in (
        ({"strategy": "lorra"}, "STRATEGY_NOT_FOUND"),
        ({"adapter_id": "base"}, "ADAPTER_ID_INVALID"),
        ({"validation_fraction": 0.7}, "VALIDATION_FRACTION_INVALID"),
    ):
        assert (await refused(check(**fields))).reason == reason
    settings = struct_pb2.Struct()
    settings.update({"typo": True})
    assert (await refused(check(config=settings))).fields
    error = await refused(create(server, dataset=""))
    assert error.reason == "DATASET_MISSING"


async def test_the_same_request_id_creates_one_job(server):
    first = await create(server, request_id="r")
    assert (await create(server, request_id="r")).name == first.name


async def test_a_job_can_be_cancelled_and_publishes_nothing(make_server, refused):
    server = await make_server(options={"job_steps": 1000})
    job = await create(server)
    call = server.tuning.WatchTuningJob(pb.WatchTuningJobRequest(name=job.name))
    while (await call.read()).event.WhichOneof("event") != "progress":
        pass
    cancelled = (await server.tuning.CancelTuningJob(pb.CancelTuningJobRequest(name=job.name))).job
    assert cancelled.state == STATE.TUNING_JOB_STATE_CANCELLED
    while (message := await call.read()) is not grpc.aio.EOF:
        last = message
    assert last.event.state == STATE.TUNING_JOB_STATE_CANCELLED
    error = await refused(server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="adapters/tuned")))
    assert error.code == "NOT_FOUND"


async def test_a_watcher_that_goes_away_leaves_nothing(make_server):
    server = await make_server(options={"job_steps": 1000})
    job = await create(server)
    call = server.tuning.WatchTuningJob(pb.WatchTuningJobRequest(name=job.name))
    await call.read()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.read()
    assert await server.front._drain.wait_idle(2)


async def test_a_drain_ends_a_watch_with_unavailable(make_server, refused):
    server = await make_server(options={"job_steps": 1000})
    job = await create(server)
    call = server.tuning.WatchTuningJob(pb.WatchTuningJobRequest(name=job.name))
    await call.read()
    drain = asyncio.create_task(server.front.drain())
    error = await refused(call)
    assert (error.code, error.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
    await asyncio.wait_for(drain, 5)


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"strategy": ""}, "", "spec.strategy"),
        ({"strategy": "nobody"}, "", "spec.strategy"),
        ({"strategy": "broken"}, "", "spec.strategy"),
        ({"dataset": ""}, "INVALID_ARGUMENT", "spec.dataset"),
        ({"dataset": "datasets/../x"}, "INVALID_ARGUMENT", "spec.dataset"),
        ({"dataset": "datasets/ds-none"}, "NOT_FOUND", "spec.dataset"),
        ({"validation_dataset": "ds-1"}, "INVALID_ARGUMENT", "spec.validation_dataset"),
        ({"validation_dataset": "datasets/ds-1"}, "NOT_FOUND", "spec.validation_dataset"),
        ({"validation_fraction": 0.6}, "INVALID_ARGUMENT", "spec.validation_fraction"),
        ({"validation_fraction": -0.1}, "INVALID_ARGUMENT", "spec.validation_fraction"),
        ({"validation_fraction": math.nan}, "INVALID_ARGUMENT", "spec.validation_fraction"),
        ({"adapter_id": ""}, "INVALID_ARGUMENT", "spec.adapter_id"),
        ({"adapter_id": "base"}, "INVALID_ARGUMENT", "spec.adapter_id"),
        ({"adapter_id": "../x"}, "INVALID_ARGUMENT", "spec.adapter_id"),
        ({"config": {"typo": 1}}, "INVALID_ARGUMENT", "spec.config.typo"),
        ({"config": {"rank": math.inf}}, "INVALID_ARGUMENT", "spec.config.rank"),
        ({"config": {"deep": {"list": [1, math.nan]}}}, "INVALID_ARGUMENT", "spec.config.deep.list"),
        ({"request_id": "a b"}, "INVALID_ARGUMENT", "request_id"),
    ],
)
async def test_a_wrong_job_is_named(shared, refused, fields, code, field):
    error = await refused(create(shared, **fields))
    assert error.code == code or (not code and error.code in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"))
    assert field in error.fields, error
    assert not (await shared.tuning.ListTuningJobs(pb.ListTuningJobsRequest())).jobs


async def test_unknown_jobs_are_not_found(shared, refused):
    name = "tuningJobs/job-none"
    for call in (
        shared.tuning.GetTuningJob(pb.GetTuningJobRequest(name=name)),
        shared.tuning.CancelTuningJob(pb.CancelTuningJobRequest(name=name)),
        shared.tuning.WatchTuningJob(pb.WatchTuningJobRequest(name=name)),
    ):
        assert (await refused(call)).code == "NOT_FOUND"
    error = await refused(shared.tuning.WatchTuningJob(pb.WatchTuningJobRequest(name=name, after_sequence=-1)))
    assert "after_sequence" in error.fields
