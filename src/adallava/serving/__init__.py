"""A server that gives each request its budget: engine, governor and an OpenAI-compatible HTTP interface."""
