"""The serving daemon: OpenAI's API over a BatchEngine. Needs the `serve` extra (FastAPI, uvicorn, …, see pyproject.toml)."""
