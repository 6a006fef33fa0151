"""Images for prompts: sampling options, sampler, `Generator`, files with a manifest."""
