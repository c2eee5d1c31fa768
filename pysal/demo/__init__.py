"""Internal: `pysal demo`, the methods side by side in a browser, on loopback; needs the extra `demo`.

session.py computes, pictures.py and article.py say it in HTML, page.py lays it out with Gradio, server.py answers requests.
"""
