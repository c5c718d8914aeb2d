"""Shared by all tests: one torch thread, no network, and a line that counts the real-model tests."""
import os
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
import pytest, torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    "One line that says whether a real language model was tested."
    seen = {kind: sum("test_real_model" in r.nodeid for r in terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "skipped")}
    why = {r.longrepr[2] for r in terminalreporter.stats.get("skipped", []) if "test_real_model" in r.nodeid}
    terminalreporter.write_line(f"real-model tests: {seen['passed'] + seen['failed']} run, {seen['skipped']} skipped" + "".join(f" ({w})" for w in sorted(why)))
