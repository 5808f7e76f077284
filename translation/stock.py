"""What this package uses of fairseq, imported in one place and without what fairseq says of itself at every start."""

import logging
import warnings

_root = logging.root
_before, _level, _handlers = _root.manager.disable, _root.level, list(_root.handlers)
logging.disable(logging.INFO)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fairseq import checkpoint_utils as checkpoint_utils
    from fairseq import options as options
    from fairseq import tasks as tasks
    from fairseq import utils as utils
    from fairseq.data import Dictionary as Dictionary
    from fairseq.file_io import PathManager as PathManager
    from fairseq.logging import metrics as metrics
    from fairseq.tasks import register_task as register_task
    from fairseq.tasks.language_modeling import LanguageModelingConfig as LanguageModelingConfig
    from fairseq.tasks.language_modeling import LanguageModelingTask as LanguageModelingTask
    from fairseq.tasks.translation import TranslationConfig as TranslationConfig
    from fairseq.tasks.translation import TranslationTask as TranslationTask
    from fairseq.trainer import Trainer as Trainer
    from fairseq_cli import preprocess as preprocess
    from fairseq_cli import train as train
    from fairseq_cli.eval_lm import eval_lm as eval_lm
logging.disable(_before)
# Some of its modules set up the whole process's log, down to every library's debug lines.
_root.setLevel(_level)
_root.handlers[:] = _handlers
