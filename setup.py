"""Packaging: each folder is installed as `recscale.<folder>`, so nothing called `models` enters an environment."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ["pallas_kernels", "models", "scaling", "sweeps"]
HERE = Path(__file__).parent

packages = [
    f"recscale.{name}"
    for folder in FOLDERS
    for name in [folder, *(f"{folder}.{package}" for package in find_packages(str(HERE / folder)))]
]

# What training, sweeps, fits and reports need; `recscale.models` and `recscale.pallas_kernels` do without.
LAB = [
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11",
    "grain>=0.2.12",
    "duckdb>=2.0",
    "jsonschema>=4.20",
    "wandb>=0.19",
    "flatbuffers>=25",
    "scipy>=1.14",
    "pandas>=2.2",
    "pyarrow>=17",
    "matplotlib>=3.9",
    "plotly>=6.0",
    "jinja2>=3.1",
    "pyyaml>=6",
    "rich>=13",
]
TENSORBOARD = ["tensorboard>=2.16"]
# Of the modules alone, and of the laboratory.
TESTS = ["pytest>=8", "pytest-xdist>=3.6", "beartype>=0.20"]
LAB_TESTS = [*TESTS, "submitit>=1.5", "pyyaml>=6", *TENSORBOARD]
STYLE = ["ruff>=0.8", "pyright[nodejs]>=1.1.390", "pandas-stubs>=2.2", "scipy-stubs>=1.15"]

setup(
    name="recscale",
    version="0.1.0",
    description="Scaling laws of ranking models in JAX: sweep, fit with honest intervals, plot, reuse.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={f"recscale.{folder}": folder for folder in FOLDERS},
    packages=packages,
    package_data={
        "recscale.scaling": [
            "py.typed",
            "training/__init__.pyi",
            "laws/__init__.pyi",
            "data/importing/*.json",
            "data/importing/schemas/*.toml",
            "laws/published/*.json",
            "laws/published/*.md",
            "report/*.j2",
            "report/*.js",
            "report/*.mplstyle",
        ],
        "recscale.pallas_kernels": ["py.typed", "*/tuned/*.json", "targets/*.txtpb"],
        "recscale.models": ["py.typed", "__init__.pyi"],
        "recscale.sweeps": ["py.typed", "engine/templates/*.j2"],
    },
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "jaxtyping>=0.3",
        "lazy-loader>=0.4",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "click>=8.1",
    ],
    extras_require={
        "lab": LAB,
        "tests": TESTS,
        "dev": [*LAB, *LAB_TESTS, *STYLE, "pytest-cov>=6"],
        "notebooks": [*LAB, "equinox>=0.13", "nbclient>=0.11", "nbformat>=5.10", "ipykernel>=6.29"],
        "tpu": [*LAB, "jax[tpu]>=0.10"],
        "cuda": [*LAB, "jax[cuda13]>=0.10"],
        "slurm": [*LAB, "submitit>=1.5"],
        "ray": [*LAB, "ray>=2.40"],
        "tensorboard": [*LAB, *TENSORBOARD],
        "bench": [*LAB, "torch>=2.5"],
    },
    entry_points={
        "console_scripts": ["recscale = recscale.scaling.cli:main"],
        # The command line looks its commands up by name, so a folder further down the import chain
        # (or another distribution) adds a command without `scaling` importing it.
        "recscale.commands": [
            "fit = recscale.scaling.laws.fit_command:fit",
            "compare = recscale.scaling.laws.comparing.compare_command:compare",
            "decisions = recscale.scaling.laws.comparing.decisions_command:decisions",
            "isoflop = recscale.scaling.laws.isoflop.isoflop_command:isoflop",
            "optimum = recscale.scaling.laws.isoflop.optimum_command:optimum",
            "specification = recscale.scaling.laws.judgement.specification_command:specification",
            "published = recscale.scaling.laws.published.published_command:published",
            "forecast = recscale.scaling.laws.forecasting.forecast_command:forecast",
            "pool = recscale.scaling.laws.forecasting.pool_command:pool",
            "design = recscale.sweeps.engine.design_command:design",
            "data = recscale.scaling.data.data_command:data",
            "count = recscale.scaling.counting.count_commands:count",
            "size = recscale.scaling.counting.count_commands:size",
            "models = recscale.scaling.counting.count_commands:models",
            "train = recscale.scaling.training.train_command:train",
            "evaluate = recscale.scaling.training.model_commands:evaluate",
            "predict = recscale.scaling.training.model_commands:predict",
            "export = recscale.scaling.serving.export_command:export",
            "aot = recscale.scaling.aot.aot_command:aot",
            "bench = recscale.scaling.bench.bench_commands:bench",
            "report = recscale.scaling.report.report_command:report",
            "plot = recscale.scaling.report.plot_command:plot",
            "plan = recscale.sweeps.engine.sweep_commands:plan",
            "launch = recscale.sweeps.engine.sweep_commands:launch",
            "status = recscale.sweeps.engine.sweep_commands:status",
            "collect = recscale.sweeps.engine.sweep_commands:collect",
            "sweep = recscale.sweeps.engine.sweep_commands:sweep",
            "cancel = recscale.sweeps.engine.sweep_commands:cancel",
            "run-job = recscale.sweeps.engine.job_command:run_job",
            "paper = recscale.sweeps.engine.sweep_commands:paper",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
