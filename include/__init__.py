"""The examples' own material: data, models, expectations, templates and the little services they talk to."""
