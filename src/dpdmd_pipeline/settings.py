"""Project settings: https://docs.kedro.org/en/stable/configure/configuration_basics/#configuration"""

import warnings

from kedro import KedroDeprecationWarning

from dpdmd_pipeline.configuration import ConfigLoader, run_folder
from dpdmd_pipeline.hooks import ConfigHooks, ErrorHooks, ReportHooks, prepare_log_files
from dpdmd_pipeline.screen import screen

HOOKS = (ConfigHooks(), ErrorHooks(), ReportHooks(), screen)

CONFIG_LOADER_CLASS = ConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # Another environment, or --params, changes single options of a group and keeps the others.
    "merge_strategy": {"parameters": "soft"},
    "custom_resolvers": {"run_folder": run_folder},
}

# The older spelling `kedro run --pipeline=distill` is welcome here.
warnings.filterwarnings("ignore", message="Option '--pipeline' is deprecated", category=KedroDeprecationWarning)

prepare_log_files()
