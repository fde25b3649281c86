//! The UAPI socket: one line protocol per connection, bounded in size, number and time.

use std::io::{self, BufRead, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::Arc;
use std::time::Duration;

use zeroize::{Zeroize, Zeroizing};

use crate::crypto::burn_stack;
use crate::engine::Engine;
use crate::error::{EngineError, Result};
use crate::handover::{give, REQUEST};
use crate::log::{log, Level};
use crate::sys::{now_ms, with_umask};
use crate::uapi::{apply, parse_set, report, Errno};

const DEFAULT_DIR: &str = "/var/run/wireguard";
/// Largest `set` accepted.
const MAX_REQUEST: usize = 32 << 20;
const MAX_CONNECTIONS: usize = 64;
const IDLE: Duration = Duration::from_secs(30);

/// The listening socket; its file goes away with it.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    live: Arc<AtomicUsize>,
}

/// Where the socket of `name` is.
pub fn socket_path(name: &str) -> PathBuf {
    let dir = std::env::var_os("WG_UAPI_DIR").filter(|d| !d.is_empty());
    Path::new(&dir.unwrap_or_else(|| DEFAULT_DIR.into())).join(format!("{name}.sock"))
}

impl Server {
    /// Creates the directory (0700) and the socket (0600). A dead engine's socket is replaced,
    /// a living one's refused.
    pub fn listen(name: &str) -> Result<Self> {
        let path = socket_path(name);
        let fail = |e: io::Error| {
            EngineError::device(
                format!("UAPI socket {}", path.display()),
                e,
                "run as root, or set WG_UAPI_DIR to a directory you may write to",
            )
        };
        if let Some(dir) = path.parent() {
            if !dir.is_dir() {
                std::fs::create_dir_all(dir).map_err(fail)?;
                std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(fail)?;
            }
        }
        if UnixStream::connect(&path).is_ok() {
            return Err(EngineError::device(
                format!("interface {name}"),
                "another engine serves it",
                format!("stop the process that holds {}", path.display()),
            ));
        }
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
            _ => {}
        }
        // Born with 0600: no moment in which others could connect.
        // And listening before it has its name: a `wg` that is refused takes the file for a dead
        // engine's and removes it.
        let unready = path.with_extension(format!("{}.new", std::process::id()));
        let listener = with_umask(0o177, || UnixListener::bind(&unready)).map_err(fail)?;
        std::fs::rename(&unready, &path).map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        Ok(Self { listener, path, live: Arc::new(AtomicUsize::new(0)) })
    }

    /// The socket of an engine that handed it over.
    pub fn inherited(name: &str, listener: OwnedFd) -> Self {
        Self { listener: listener.into(), path: socket_path(name), live: Arc::new(AtomicUsize::new(0)) }
    }

    /// Lets go without removing the file: it is another process's.
    pub fn leave(mut self) {
        self.path = PathBuf::new();
    }

    /// Accepts all waiting connections, one short-lived thread each.
    pub fn accept(&self, engine: &Arc<Engine>) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.live.fetch_add(1, Relaxed) >= MAX_CONNECTIONS {
                self.live.fetch_sub(1, Relaxed);
                continue;
            }
            let (engine, live, listener) = (engine.clone(), self.live.clone(), self.listener.as_raw_fd());
            let started =
                std::thread::Builder::new().name("uapi".into()).stack_size(256 * 1024).spawn(move || {
                    // A client that goes away is no event.
                    let _ = serve(&engine, stream, listener);
                    // The stack may be another thread's next.
                    burn_stack();
                    live.fetch_sub(1, Relaxed);
                });
            if started.is_err() {
                self.live.fetch_sub(1, Relaxed);
            }
        }
    }
}

impl AsRawFd for Server {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A buffered reader that wipes what was read from it.
struct WipedReader<R> {
    inner: R,
    buf: Zeroizing<Vec<u8>>,
    start: usize,
    end: usize,
}

impl<R: Read> WipedReader<R> {
    fn new(inner: R) -> Self {
        Self { inner, buf: Zeroizing::new(vec![0; 64 * 1024]), start: 0, end: 0 }
    }
}

impl<R: Read> Read for WipedReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(out)?;
        self.consume(n);
        Ok(n)
    }
}

impl<R: Read> BufRead for WipedReader<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            self.start = 0;
            self.end = self.inner.read(&mut self.buf)?;
        }
        Ok(&self.buf[self.start..self.end])
    }

    fn consume(&mut self, n: usize) {
        self.buf[self.start..self.start + n].zeroize();
        self.start += n;
    }
}

/// What one request was.
pub enum Request {
    Get,
    Set(Zeroizing<String>),
    /// Another process of ours wants to go on in our place, with this format of the state.
    TakeOver(u32),
    Bad(Errno),
    End,
}

/// Reads one request: its operation line and, for `set`, the lines up to the empty one.
pub fn read_request(r: &mut impl BufRead) -> io::Result<Request> {
    let mut text = Zeroizing::new(String::new());
    let mut r = r.take(MAX_REQUEST as u64);
    let mut op = String::new();
    while op.trim_end_matches('\n').is_empty() {
        op.clear();
        if r.read_line(&mut op)? == 0 {
            return Ok(Request::End);
        }
    }
    let op = op.trim_end_matches('\n');
    let (set, take_over) = (op == "set=1", op == REQUEST);
    if !set && !take_over && op != "get=1" {
        return Ok(Request::Bad(Errno(libc::EINVAL)));
    }
    loop {
        let before = text.len();
        reserve(&mut text);
        if r.read_line(&mut text)? == 0 {
            // Cut off or too large: never apply a part.
            let why = if r.limit() == 0 { libc::E2BIG } else { libc::EPROTO };
            return Ok(Request::Bad(Errno(why)));
        }
        if &text[before..] == "\n" {
            break;
        }
        if !set && !take_over {
            return Ok(Request::Bad(Errno(libc::EINVAL)));
        }
    }
    if take_over {
        let format = text.trim_end().strip_prefix("format=").and_then(|f| f.parse().ok());
        return Ok(format.map_or(Request::Bad(Errno(libc::EINVAL)), Request::TakeOver));
    }
    Ok(if set { Request::Set(text) } else { Request::Get })
}

/// Grows by copying and wiping: a plain reallocation would leave keys in freed memory.
fn reserve(text: &mut Zeroizing<String>) {
    if text.capacity() - text.len() < 4096 {
        let mut bigger = Zeroizing::new(String::with_capacity((text.capacity() * 2).max(16 * 1024)));
        bigger.push_str(text);
        text.zeroize();
        *text = bigger;
    }
}

fn serve(engine: &Arc<Engine>, stream: UnixStream, listener: RawFd) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let (mut out, own) = (stream.try_clone()?, stream.try_clone()?);
    let mut input = WipedReader::new(stream);
    loop {
        let errno = match read_request(&mut input) {
            Ok(Request::End) => return Ok(()),
            Ok(Request::Get) => {
                report(engine, &mut out)?;
                continue;
            }
            Ok(Request::Set(text)) => {
                let lines = text.lines().filter(|l| !l.is_empty());
                match parse_set(lines).and_then(|c| apply(engine, c, now_ms())) {
                    Ok(()) => 0,
                    Err(Errno(e)) => -e,
                }
            }
            Ok(Request::TakeOver(format)) => {
                let Errno(e) = give(engine, listener, format, &own);
                log(Level::Error, &format!("not handed over: {}", io::Error::from_raw_os_error(e)));
                write!(out, "errno={}\n\n", -e)?;
                return Ok(());
            }
            Ok(Request::Bad(Errno(e))) => {
                write!(out, "errno={}\n\n", -e)?;
                return Ok(());
            }
            // Not UTF-8.
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                write!(out, "errno={}\n\n", -libc::EINVAL)?;
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        write!(out, "errno={errno}\n\n")?;
    }
}
