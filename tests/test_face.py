import subprocess
import sys

import diptych


def test_the_face_is_sorted_and_every_name_on_it_is_there():
    assert diptych.__all__ == sorted(diptych.__all__)
    assert set(diptych.__all__) == set(diptych._HOME)
    for name in diptych.__all__:
        assert getattr(diptych, name) is not None
    assert set(diptych.__all__) < set(dir(diptych))


def test_a_name_that_is_not_on_the_face_is_an_attribute_error():
    assert not hasattr(diptych, "clip")


def test_importing_diptych_asking_for_help_and_planning_do_not_import_torch():
    script = (
        "import sys, diptych, diptych.cli\n"
        "try: diptych.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "try: diptych.cli.main(['plan', 'ViT-B-32', '--json'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
