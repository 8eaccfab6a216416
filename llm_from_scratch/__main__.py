"""`python -m llm_from_scratch` is `scratchlm`."""

from llm_from_scratch.cli.main import main

if __name__ == "__main__":
    main()
