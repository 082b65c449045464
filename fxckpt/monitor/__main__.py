"""``python -m fxckpt.monitor``: started by the trainer, with descriptors that only it can give."""

import sys

from fxckpt.monitor.process import main

sys.exit(main(sys.argv[1:]))
