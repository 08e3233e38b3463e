"""The tests' own cache of compiled programs hides nothing from them."""

import os

import jax
import jax.numpy as jnp
import programs
import pytest


@pytest.fixture
def own_cache(tmp_path):
    """An empty cache that keeps every program, whatever its time."""
    seconds = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    programs._compile(programs._usual[0], str(tmp_path))
    yield tmp_path
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    programs._compile(*programs._usual)


def test_a_kept_program_reports_what_a_compiled_one_does(own_cache):
    """Tests assert on the memory and on the text of programs."""
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    x = jax.ShapeDtypeStruct((300, 40), jnp.float32)
    # Two functions of one program: JAX itself remembers what it did of one function.
    compiled, read = (
        jax.jit(lambda x: jnp.sort(jnp.sin(x) @ x.T).sum()).lower(x).compile()
        for _ in range(2)
    )
    assert events.count("/jax/compilation_cache/cache_hits") == 1
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes >= 300 * 300 * 4
    for name in ("temp_size_in_bytes", "alias_size_in_bytes"):
        assert getattr(read.memory_analysis(), name) == getattr(memory, name)
    operations = [text.as_text().count("fusion") for text in (compiled, read)]
    assert operations[0] == operations[1]


def test_the_folder_of_kept_programs(monkeypatch, tmp_path):
    monkeypatch.delenv("TRIPLETJAX_TESTS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = programs.cache_folder()
    assert folder.startswith(str(tmp_path / "tripletjax-tests"))
    assert jax.__version__ in folder
    monkeypatch.setenv("TRIPLETJAX_TESTS_CACHE", str(tmp_path / "cold"))
    assert programs.cache_folder() == str(tmp_path / "cold")


def test_old_programs_are_removed(tmp_path):
    for age, name in enumerate("cab"):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (age, age))
    programs.remove_old_programs(str(tmp_path), most_bytes=250)
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b"}
    programs.remove_old_programs(str(tmp_path / "none"))


def test_a_process_that_is_killed_writes_no_program():
    seconds = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    assert float(programs.quickly(killed=True)[seconds]) == float("inf")
    assert float(programs.quickly()[seconds]) < 1
