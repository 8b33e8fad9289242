"""The face: magics, prompts, panels and widgets."""
