"""Models over HTTP: OpenAI's protocol, and a web page that shows what a model is thinking."""
