"""An HTTP server of a run's model that speaks as OpenAI's API of completions does."""
