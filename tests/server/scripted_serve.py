"""`graftwork serve` with the scripted engine in place of the real one: `--model` names the directory of its options."""

import sys
from pathlib import Path

from graftwork_server.front import serve as program
from graftwork_server.front.front import Front


class ScriptedFront(Front):
    """A front whose engine is the script."""

    def __init__(self, config):
        super().__init__(config, engine_command=(sys.executable, str(Path(__file__).with_name("scripted_engine.py"))))


program.Front = ScriptedFront

if __name__ == "__main__":
    sys.exit(program.main())
