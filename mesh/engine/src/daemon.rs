//! Command line, daemonising, set-up and the control loop.

use std::io;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use crate::accelerated;
use crate::confine;
use crate::crypto::burn_stack;
use crate::device::{Action, Core};
use crate::engine::Engine;
use crate::error::{EngineError, Result, EXIT_FAILURE};
use crate::events;
use crate::handover;
use crate::log::{configure, log, Level};
use crate::netlink::{self, LinkEvent, LinkSettings, LinkWatch};
use crate::server::Server;
use crate::sys::{
    detach, exit_now, fork, harden_process, now, now_ms, pipe, termination_signals, Epoll, EventFd, Ready,
};
use crate::tun;
use crate::tx::Tx;
use crate::udp::{self_test, UdpOptions};
use crate::worker;

const HELP: &str = "\
retinue-engine: a WireGuard device in userspace, driven over the UAPI socket

Usage: retinue-engine [OPTIONS] IFNAME

Options:
  -f, --foreground      stay in the foreground (WG_PROCESS_FOREGROUND=1 does the same)
  --workers N           packet threads, each with its own TUN queue and UDP socket (default: half
                        the cores, at least 1)
  --poll-us N           after bulk traffic, look by the clock for so many microseconds before
                        sleeping until called (default 200)
  --low-power           never look by the clock: sleep until woken
  --take-over           go on in the place of the running engine of IFNAME, with its sessions, sockets
                        and queues; if that fails, it goes on itself
  --mtu N               MTU of the new interface (default 1420)
  --no-tun-offload      no TSO/USO superpackets on the TUN
  --no-udp-gso          one send per datagram
  --no-udp-gro          one receive buffer per datagram
  --no-avx512           ciphers by AWS-LC alone
  --log-level LEVEL     silent, error (default), info or verbose (LOG_LEVEL does the same)
  -h, --help            this text
  -V, --version         the version

Environment:
  WG_UAPI_DIR           directory of the UAPI socket (default /var/run/wireguard)
  RETINUE_ENGINE_OPTIONS
                        options put before those of the command line, separated by spaces: how to
                        reach an engine that an agent starts (the agent hands it on)

Examples:
  retinue-engine wg0 && wg setconf wg0 wg0.conf && ip link set wg0 up
  retinue-engine --foreground --low-power mesh0
  retinue-engine --no-udp-gso --no-tun-offload wg0     # if a kernel's offloads misbehave

Exit status: 0 done, 1 failure, 2 usage, 4 missing privilege or device.
";

const DEFAULT_MTU: u32 = 1420;
const DEFAULT_POLL_US: u64 = 200;
/// One superpacket of this size, sealed, fits one UDP_SEGMENT send.
const GSO_MAX: u32 = 60_000;
const TX_QUEUE: u32 = 1000;
const MAX_WORKERS: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub name: String,
    pub foreground: bool,
    pub take_over: bool,
    pub workers: usize,
    pub poll_us: u64,
    pub low_power: bool,
    pub mtu: u32,
    pub tun_offload: bool,
    pub udp_gso: bool,
    pub udp_gro: bool,
    pub avx512: bool,
    pub level: Level,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Run(Options),
    Help,
    Version,
}

fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get() / 2).clamp(1, 8)
}

/// Parses arguments (without the program name).
pub fn parse_args(args: &[String]) -> Result<Command> {
    let env = |k: &str| std::env::var(k).unwrap_or_default();
    let mut o = Options {
        name: String::new(),
        foreground: env("WG_PROCESS_FOREGROUND") == "1",
        take_over: false,
        workers: default_workers(),
        poll_us: DEFAULT_POLL_US,
        low_power: false,
        mtu: DEFAULT_MTU,
        tun_offload: true,
        udp_gso: true,
        udp_gro: true,
        avx512: true,
        level: Level::parse(&env("LOG_LEVEL")).unwrap_or(Level::Error),
    };
    let mut it = args.iter();
    while let Some(a) = it.next() {
        let (flag, inline) = match a.split_once('=') {
            Some((f, v)) if f.starts_with("--") => (f, Some(v.to_owned())),
            _ => (a.as_str(), None),
        };
        let takes_value = matches!(flag, "--workers" | "--poll-us" | "--mtu" | "--log-level");
        if inline.is_some() && !takes_value {
            return Err(EngineError::usage(format!("option {flag}"), "it takes no value"));
        }
        let value = if takes_value {
            let v = inline.or_else(|| it.next().cloned());
            v.ok_or_else(|| EngineError::usage(format!("option {flag}"), "a value is missing"))?
        } else {
            String::new()
        };
        let number = |low: u64, high: u64| -> Result<u64> {
            value.parse().ok().filter(|n| (low..=high).contains(n)).ok_or_else(|| {
                EngineError::usage(
                    format!("option {flag}"),
                    format!("{value:?} is not a number from {low} to {high}"),
                )
            })
        };
        match flag {
            "-h" | "--help" => return Ok(Command::Help),
            "-V" | "--version" => return Ok(Command::Version),
            "-f" | "--foreground" => o.foreground = true,
            "--take-over" => o.take_over = true,
            "--low-power" => o.low_power = true,
            "--no-tun-offload" => o.tun_offload = false,
            "--no-udp-gso" => o.udp_gso = false,
            "--no-udp-gro" => o.udp_gro = false,
            "--no-avx512" => o.avx512 = false,
            "--workers" => o.workers = number(1, MAX_WORKERS as u64)? as usize,
            "--poll-us" => o.poll_us = number(0, 1000)?,
            "--mtu" => o.mtu = number(576, 65_535)? as u32,
            "--log-level" => {
                o.level = Level::parse(&value).ok_or_else(|| {
                    EngineError::usage(
                        "option --log-level",
                        format!("{value:?} is not silent, error, info or verbose"),
                    )
                })?;
            }
            _ if a.starts_with('-') => return Err(EngineError::usage(format!("option {a}"), "unknown")),
            _ if o.name.is_empty() => o.name.clone_from(a),
            _ => return Err(EngineError::usage(format!("argument {a}"), "one interface name is enough")),
        }
    }
    if o.name.is_empty() {
        return Err(EngineError::usage("interface name", "missing"));
    }
    if !tun::valid_name(&o.name) {
        return Err(EngineError::usage(
            format!("interface name {:?}", o.name),
            "it must have 1 to 15 printable characters without / : %",
        ));
    }
    Ok(Command::Run(o))
}

const OPTIONS_VARIABLE: &str = "RETINUE_ENGINE_OPTIONS";

fn environment_options(value: &str) -> Vec<String> {
    value.split_whitespace().map(str::to_owned).collect()
}

/// Runs the engine with `args` (without the program name); returns the exit status.
pub fn main(args: &[String]) -> i32 {
    // One line whatever happens: a panic is a fault of ours, not the user's business.
    std::panic::set_hook(Box::new(|info| {
        let at = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        eprintln!("retinue-engine: internal error at {at} (hint: please report it)");
    }));
    let mut all = environment_options(&std::env::var(OPTIONS_VARIABLE).unwrap_or_default());
    all.extend_from_slice(args);
    let run = || match parse_args(&all)? {
        Command::Help => {
            print_out(HELP);
            Ok(0)
        }
        Command::Version => {
            if all.iter().any(|word| word == "--no-avx512") {
                accelerated::turn_off();
            }
            print_out(&format!("retinue-engine {} (ciphers: {})\n", env!("CARGO_PKG_VERSION"), ciphers()));
            Ok(0)
        }
        Command::Run(o) => start(&o),
    };
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(Ok(code)) => code,
        Ok(Err(e)) => {
            eprintln!("retinue-engine: {e}");
            e.exit
        }
        Err(_) => EXIT_FAILURE,
    }
}

fn print_out(s: &str) {
    // A closed pipe is the reader's choice.
    let _ = io::stdout().write_all(s.as_bytes());
}

fn ciphers() -> &'static str {
    if accelerated::usable() {
        "AVX-512"
    } else {
        "AWS-LC"
    }
}

fn start(o: &Options) -> Result<i32> {
    configure(o.level, &o.name);
    harden_process();
    if !o.avx512 {
        accelerated::turn_off();
    }
    if o.foreground {
        return serve(o, || {});
    }
    daemonise(o)
}

fn os_failure(what: &str) -> impl Fn(io::Error) -> EngineError + '_ {
    move |e| EngineError::failure(what, e, "")
}

/// Forks; the parent returns when the child's UAPI socket answers or its set-up failed.
fn daemonise(o: &Options) -> Result<i32> {
    let (reader, writer) = pipe().map_err(os_failure("pipe"))?;
    // No other thread of ours runs yet; the child only goes on in this function.
    match fork().map_err(os_failure("fork"))? {
        true => {
            drop(reader);
            let writer = std::fs::File::from(writer);
            detach(writer.as_raw_fd());
            let told = std::cell::Cell::new(false);
            let outcome = serve(o, || {
                // The parent may have been killed: then nobody waits.
                let _ = (&writer).write_all(b"0\n");
                told.set(true);
            });
            let code = match outcome {
                Ok(code) => code,
                Err(e) => {
                    if !told.get() {
                        let _ = writeln!(&writer, "{} {e}", e.exit);
                    }
                    e.exit
                }
            };
            exit_now(code)
        }
        false => {
            drop(writer);
            let mut text = Vec::new();
            let mut r = io::BufReader::new(std::fs::File::from(reader));
            let _ = io::BufRead::read_until(&mut r, b'\n', &mut text);
            let text = String::from_utf8_lossy(&text);
            match text.trim_end().split_once(' ') {
                None if text.trim_end() == "0" => Ok(0),
                Some((code, message)) => {
                    eprintln!("retinue-engine: {message}");
                    Ok(code.parse().unwrap_or(EXIT_FAILURE))
                }
                None => {
                    Err(EngineError::failure("start", "the engine ended during set-up", "try --foreground"))
                }
            }
        }
    }
}

const TOKEN_UAPI: u64 = 0;
const TOKEN_EVENTS: u64 = 1;
const TOKEN_SIGNAL: u64 = 2;
const TOKEN_LINK: u64 = 3;

/// Sets everything up, calls `ready` when the UAPI socket answers, runs until told to stop.
fn serve(o: &Options, ready: impl FnOnce()) -> Result<i32> {
    let signals = termination_signals().map_err(os_failure("signals"))?;
    let control_wake = Arc::new(EventFd::new().map_err(os_failure("eventfd"))?);
    let waker = control_wake.clone();
    let wake: Box<dyn Fn() + Send + Sync> = Box::new(move || waker.signal());
    let make_wakes = |queues: usize| {
        (0..queues).map(|_| EventFd::new()).collect::<io::Result<Vec<_>>>().map_err(os_failure("eventfd"))
    };
    let (engine, server, claim) = if o.take_over {
        // Packets wait from the moment we ask: all that can be done before is.
        let from = handover::ask(&o.name, now_ms(), wake)?;
        let claim = from.claim().map_err(os_failure("take-over"))?;
        let wakes = make_wakes(from.queues.len())?;
        let engine = Engine::new(from.core, from.queues, from.offloads, from.udp, wakes, control_wake);
        engine.sockets.store(Arc::new(from.sockets));
        engine.port.store(from.port, Relaxed);
        engine.mark.store(from.mark, Relaxed);
        (engine, Server::inherited(&o.name, from.listener), Some(claim))
    } else {
        // Before the TUN exists: a second engine must not disturb the first.
        let server = Server::listen(&o.name)?;
        (create(o, wake, control_wake, make_wakes)?, server, None)
    };
    let engine = Arc::new(engine);
    let queues = engine.queues.len();
    if let Some(claim) = claim {
        if let Err(e) = claim.own(&o.name) {
            server.leave();
            return Err(e);
        }
    }
    let poll_us = if o.low_power { 0 } else { o.poll_us };
    let mut handles = Vec::with_capacity(queues);
    for queue in 0..queues {
        let engine = engine.clone();
        let h = std::thread::Builder::new().name(format!("worker{queue}")).spawn(move || {
            let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                worker::run(&engine, queue, poll_us)
            }));
            if let Ok(Err(e)) = &r {
                log(Level::Error, &format!("worker {queue}: {e}"));
            }
            // A worker that ended for whatever reason ends the engine: its supervisor restarts it.
            engine.shutdown();
            matches!(r, Ok(Ok(())))
        });
        handles.push(h.map_err(os_failure("thread"))?);
    }
    let ciphers = ciphers(); // asked before the filter: it allocates

    // This thread and those it starts: UAPI, handshakes, timers, the link. Not the packet threads, which exist already: with a
    // filter on them a third of all small packets was lost at full rate.
    match confine::enter() {
        Ok(true) => {}
        Ok(false) => log(Level::Error, "this kernel has no system-call filter: running without one"),
        Err(e) => {
            engine.shutdown();
            return Err(os_failure("seccomp")(e));
        }
    }
    log(
        Level::Info,
        &format!("started: {queues} queue(s), TUN offloads {:?}, ciphers {ciphers}", engine.offloads),
    );
    ready();
    let outcome = control(&engine, &server, &o.name, signals.as_raw_fd());
    drop(server);
    engine.shutdown();
    let clean = handles.into_iter().all(|h| h.join().unwrap_or(false));
    outcome.map_err(os_failure("control loop"))?;
    Ok(if clean { 0 } else { EXIT_FAILURE })
}

/// A new device.
fn create(
    o: &Options,
    wake: Box<dyn Fn() + Send + Sync>,
    control_wake: Arc<EventFd>,
    make_wakes: impl FnOnce(usize) -> Result<Vec<EventFd>>,
) -> Result<Engine> {
    let (queues, offloads) = tun::Queue::create(&o.name, o.workers, o.tun_offload)?;
    let index = netlink::index_of(&o.name).map_err(os_failure("interface"))?;
    let settings =
        LinkSettings { mtu: o.mtu, txqlen: TX_QUEUE, gso_max: if o.tun_offload { GSO_MAX } else { 0 } };
    netlink::configure(index, settings).map_err(|e| {
        EngineError::device(format!("interface {}", o.name), e, "run as root or with CAP_NET_ADMIN")
    })?;
    let core = Core::new(now_ms(), events::Queue::new(wake), o.mtu as usize);
    let wakes = make_wakes(queues.len())?;
    let udp = self_test(UdpOptions { gso: o.udp_gso, gro: o.udp_gro });
    if (udp.gso, udp.gro) != (o.udp_gso, o.udp_gro) {
        log(Level::Error, &format!("the kernel's UDP offloads failed the self-test: using {udp:?}"));
    }
    Ok(Engine::new(core, queues, offloads, udp, wakes, control_wake))
}

/// Works off everything that waits for the control thread.
fn work_off(engine: &Engine, tx: &mut Tx, actions: &mut Vec<Action>) {
    while let Some((event, backlog)) = engine.core.queue.pop() {
        let t = now();
        engine.core.handle(event, backlog, t, actions);
        engine.execute(actions, tx, t.ms);
    }
}

/// Handshakes, timers, UAPI and signals.
fn control(engine: &Arc<Engine>, server: &Server, name: &str, signals: i32) -> io::Result<()> {
    let epoll = Epoll::new()?;
    epoll.add(server.as_raw_fd(), TOKEN_UAPI)?;
    epoll.add(engine.control_wake.as_raw_fd(), TOKEN_EVENTS)?;
    epoll.add(signals, TOKEN_SIGNAL)?;
    // Without news of the link the configured MTU stands: padding then may be less tight.
    let mut link = LinkWatch::open(name).ok().or_else(|| watch_again(engine).ok());
    if let Some(l) = &link {
        epoll.add(l.as_raw_fd(), TOKEN_LINK)?;
    }
    let core = &engine.core;
    let mut tx = Tx::default();
    let mut actions = Vec::new();
    let mut ready = [Ready { token: 0, failed: false }; 8];
    while !engine.stopping() {
        let timeout = match core.next_tick() {
            None => -1,
            Some(at) => at.saturating_sub(now_ms()).min(i32::MAX as u64) as i32,
        };
        let n = epoll.wait(timeout, &mut ready);
        for r in &ready[..n] {
            match r.token {
                TOKEN_UAPI => server.accept(engine),
                TOKEN_EVENTS => engine.control_wake.clear(),
                TOKEN_LINK => follow_link(engine, &epoll, &mut link)?,
                _ => return Ok(()),
            }
        }
        work_off(engine, &mut tx, &mut actions);
        let t = now();
        core.tick(t, &mut actions);
        engine.execute(&mut actions, &mut tx, t.ms);
        // Handshakes leave copies of what they derived.
        burn_stack();
        if engine.gate.closed() && engine.gate.waiting() == engine.wakes.len() {
            // The workers stand still: what they left is the last there is.
            work_off(engine, &mut tx, &mut actions);
            engine.gate.wait(|| ());
        }
    }
    Ok(())
}

/// Watches the link in the namespace in which it is now.
fn watch_again(engine: &Engine) -> io::Result<LinkWatch> {
    let queue = &engine.queues[0];
    LinkWatch::open_in(queue.namespace()?, queue.name()?)
}

/// Takes the MTU from the link, wherever it went.
fn follow_link(engine: &Engine, epoll: &Epoll, link: &mut Option<LinkWatch>) -> io::Result<()> {
    let mut news = Vec::new();
    if let Some(l) = link {
        l.read(&mut news);
    }
    for n in news {
        match n {
            LinkEvent::Mtu(mtu) => engine.core.mtu.store(mtu as usize, Relaxed),
            LinkEvent::Left => {
                if let Some(old) = link.take() {
                    epoll.remove(old.as_raw_fd());
                }
                // Deleted: the workers see that on the queue. Moved: watch it there.
                if let Ok(l) = watch_again(engine) {
                    epoll.add(l.as_raw_fd(), TOKEN_LINK)?;
                    *link = Some(l);
                }
                break;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(s: &str) -> Vec<String> {
        s.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn command_lines() {
        let Ok(Command::Run(o)) = parse_args(&args("-f --workers 3 --poll-us=0 --mtu 1280 --no-udp-gso wg7"))
        else {
            panic!("valid");
        };
        assert_eq!((o.name.as_str(), o.workers, o.poll_us, o.mtu), ("wg7", 3, 0, 1280));
        assert!(o.foreground && !o.udp_gso && o.udp_gro && o.tun_offload);
        assert_eq!(parse_args(&args("--help")), Ok(Command::Help));
        assert_eq!(parse_args(&args("wg0 -V")), Ok(Command::Version));
        for bad in [
            "",
            "--workers 0 wg0",
            "--workers x wg0",
            "--workers",
            "--nope wg0",
            "wg0 wg1",
            "a/b",
            "--mtu 99 w",
            "-f=1 w",
            "--log-level loud w",
        ] {
            let e = parse_args(&args(bad)).expect_err(bad);
            assert_eq!(e.exit, 2, "{bad}");
            assert!(!e.to_string().contains('\n'));
        }
    }

    #[test]
    fn options_of_the_environment_come_first() {
        let mut all = environment_options("  --no-udp-gso --poll-us 7\n--low-power ");
        all.extend(args("-f --poll-us 9 wg0"));
        let Ok(Command::Run(o)) = parse_args(&all) else { panic!("valid") };
        assert!(!o.udp_gso && o.low_power && o.foreground);
        assert_eq!((o.poll_us, o.name.as_str()), (9, "wg0"), "the command line has the last word");
    }
}
