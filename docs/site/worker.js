// Browsers start no worker from disk (file://). There, the worker of the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inner = frame.contentWindow
      this.waiting = []
      inner.document.open()
      inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inner.document.write("<!doctype html><body></body>")
      inner.document.close()
      const script = inner.document.createElement("script")
      script.src = url
      script.onload = () => {
        this.deliver = data => inner.dispatchEvent(new inner.MessageEvent("message", { data }))
        this.waiting.splice(0).forEach(this.deliver)
      }
      script.onerror = () => this.dispatchEvent(new ErrorEvent("error", { message: `${url} cannot be loaded` }))
      inner.document.body.append(script)
      this.frame = frame
    }
    postMessage(data) {
      this.deliver ? this.deliver(data) : this.waiting.push(data)
    }
    terminate() {
      this.frame.remove()
    }
  }
}
