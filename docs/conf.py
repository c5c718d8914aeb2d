"""Sphinx settings of the course's site, which `python course.py docs` builds."""

project, author = "codebook_tutorial", "The codebook_tutorial authors"
copyright = "the codebook_tutorial authors; Apache-2.0"
extensions = ["myst_nb"]
exclude_patterns = ["_build", "jupyter_execute", "_extra"]
nb_execution_mode = "off"  # pages show the committed outputs
nb_mime_priority_overrides = [("html", "text/html", 0)]
nb_code_prompt_show = "Show the code"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme, html_title = "sphinx_book_theme", "Codebook features and sparse autoencoders"
html_static_path, html_extra_path, html_css_files = ["_static"], ["_extra"], ["course.css"]
html_copy_source = False
html_theme_options = {
    "repository_url": "https://github.com/codebook-tutorial/codebook_tutorial",
    "repository_branch": "main",
    "path_to_docs": "nbs",
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "show_toc_level": 2,
}
suppress_warnings = ["myst.header"]  # a recap may follow an exercise's smaller heading
