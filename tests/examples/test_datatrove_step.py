"""The datatrove step under datatrove's own executor, against the bytes of one process."""

from datatrove.executor import LocalPipelineExecutor

from examples.datatrove_step import TraceDocuments


def stores(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def run(recipe, tmp_path, tasks, logs):
    step = TraceDocuments(str(recipe), str(tmp_path / "traces"))
    LocalPipelineExecutor([step], tasks=tasks, workers=1, logging_dir=str(tmp_path / logs)).run()


def test_tasks_leave_what_one_process_does_and_any_number_goes_on(recipe, finished, tmp_path):
    expected, out = stores(finished / "traces"), tmp_path / "traces"
    run(recipe, tmp_path, 2, "first")
    assert stores(out) == expected
    last = sorted(out.rglob("doc_*"))[-1]
    last.unlink()
    run(recipe, tmp_path, 3, "second")
    assert stores(out) == expected
