//! The packet threads: run to completion, no hand-over, looking by the clock only while there is much to do.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::Arc;

use crate::courtesy::Courtesy;
use crate::engine::Engine;
use crate::offload::{Buffers, Group, Segmenter};
use crate::rx::Rx;
use crate::sys::{exact_naps, micros, nap, now, now_ms, yield_now, Epoll, Ready};
use crate::tun::{group_len, Queue, Read, READ_LEN};
use crate::tx::{Tx, TAIL_ROOM};
use crate::udp::{Receiver, RecvBuffers, SocketPair, BATCH};

const TOKEN_TUN: u64 = 0;
const TOKEN_WAKE: u64 = 1;
const TOKEN_V4: u64 = 2;
const TOKEN_V6: u64 = 3;
/// Inner packets, and their bytes, taken from the TUN before the other direction has its turn.
const DRAIN_PACKETS: usize = 128;
const DRAIN_BYTES: usize = 256 * 1024;
/// With full GRO buffers a few per call keep the working set in cache.
const LARGE_BATCH: usize = 1;
const LARGE: usize = 16 * 1024;

/// The kernel refused a superpacket once: none is written any more, by any worker.
static NO_SUPERPACKETS: AtomicBool = AtomicBool::new(false);

/// How long a thread leaves the CPU before it looks again during bulk traffic: a wake-up by whoever
/// brings the next packet costs both more than the look, and others can use the time.
const BULK_NAP_US: u64 = 40;
/// The same after a read of many small packets that come one by one: as a network card's moderated
/// interrupt, it makes one send of what would have been ten, at the price of this much delay.
const FLOOD_NAP_US: u64 = 100;
/// Single packets within a window from which on they are many: 80,000 a second. Acknowledgements of
/// TCP at any speed are fewer.
const FLOOD_PACKETS: usize = 16;

/// Tells bulk traffic, where wake-ups are the dearest part, from sparse packets, which are to be
/// handled the moment they come.
#[derive(Default)]
struct Load {
    since: u64,
    bytes: usize,
    before: usize,
    singles: usize,
    singles_before: usize,
}

const LOAD_WINDOW_US: u64 = 200;
const BULK_BYTES: usize = 16 * 1024;

/// What was read from one direction.
#[derive(Default, Clone, Copy)]
struct Amount {
    bytes: usize,
    /// Packets from the TUN that no superpacket held together.
    singles: usize,
}

impl Load {
    /// Counts what was read at `now` (microseconds); true while a window's worth of traffic is bulk.
    fn bulk(&mut self, now: u64, read: Amount) -> bool {
        let age = now - self.since;
        if age > LOAD_WINDOW_US {
            let recent = age <= 2 * LOAD_WINDOW_US;
            self.before = if recent { self.bytes } else { 0 };
            self.singles_before = if recent { self.singles } else { 0 };
            self.since = now;
            self.bytes = 0;
            self.singles = 0;
        }
        self.bytes += read.bytes;
        self.singles += read.singles;
        self.bytes + self.before >= BULK_BYTES
    }

    /// Are single packets coming in such numbers that waiting for the next ones pays?
    fn flood(&self) -> bool {
        self.singles.max(self.singles_before) >= FLOOD_PACKETS
    }
}

struct Outbound {
    tx: Tx,
    buf: Box<[u8]>,
}

struct Inbound {
    rx: Rx,
    receiver: Receiver,
    iov: Vec<libc::iovec>,
    limit: usize,
}

/// Serves queue `queue` in both directions until the engine stops. `poll_us`: for how long after bulk
/// traffic it looks by the clock, 0 for never.
pub fn run(engine: &Engine, queue: usize, poll_us: u64) -> io::Result<()> {
    let mut courtesy = Courtesy::of_this_thread();
    exact_naps();
    let epoll = Epoll::new()?;
    let wake = &engine.wakes[queue];
    let tun = &engine.queues[queue];
    epoll.add(wake.as_raw_fd(), TOKEN_WAKE)?;
    epoll.add(tun.as_raw_fd(), TOKEN_TUN)?;
    let mut out = Outbound { tx: Tx::default(), buf: vec![0; READ_LEN].into_boxed_slice() };
    let mut inb = Inbound {
        rx: Rx::new(engine.offloads.coalescer()),
        receiver: Receiver::default(),
        iov: Vec::with_capacity(256),
        limit: BATCH,
    };
    let mut sockets: Option<Arc<Vec<SocketPair>>> = None;
    let mut ready = [Ready { token: 0, failed: false }; 8];
    let mut busy_until = 0;
    let mut load = Load::default();
    adopt(engine, &epoll, &mut sockets, queue)?;
    while !engine.stopping() {
        if engine.gate.closed() {
            engine.gate.wait(|| engine.control_wake.signal());
            continue;
        }
        let poll = poll_us > 0 && micros() < busy_until;
        let n = epoll.wait(if poll { 0 } else { -1 }, &mut ready);
        if n == 0 {
            nap(BULK_NAP_US);
            continue;
        }
        if !poll {
            courtesy.woken();
        }
        let mut read = Amount::default();
        for r in &ready[..n] {
            match r.token {
                TOKEN_WAKE => {
                    wake.clear();
                    adopt(engine, &epoll, &mut sockets, queue)?;
                }
                TOKEN_TUN => {
                    if r.failed {
                        engine.shutdown();
                        return Ok(());
                    }
                    let sent = out.drain(engine, tun, sockets.as_ref().and_then(|s| s.get(queue)));
                    read.bytes += sent.bytes;
                    read.singles += sent.singles;
                }
                token => {
                    if let Some(pair) = sockets.as_ref().and_then(|s| s.get(queue)) {
                        read.bytes += inb.receive(engine, tun, pair, token);
                    }
                }
            }
        }
        if read.bytes > 0 {
            let t = micros();
            if load.bulk(t, read) {
                busy_until = t + poll_us;
                courtesy.bulk(t);
            }
            if read.singles > 0 && read.singles < DRAIN_PACKETS && load.flood() {
                nap(FLOOD_NAP_US);
            }
        }
    }
    Ok(())
}

/// Takes over the present sockets if they changed.
fn adopt(
    engine: &Engine,
    epoll: &Epoll,
    mine: &mut Option<Arc<Vec<SocketPair>>>,
    queue: usize,
) -> io::Result<()> {
    let present = engine.sockets.load_full();
    if mine.as_ref().is_some_and(|m| Arc::ptr_eq(m, &present)) {
        return Ok(());
    }
    if let Some(old) = mine.as_ref().and_then(|m| m.get(queue)) {
        for s in old.each() {
            epoll.remove(s.as_raw_fd());
        }
    }
    if let Some(pair) = present.get(queue) {
        for (s, token) in [(&pair.v4, TOKEN_V4), (&pair.v6, TOKEN_V6)] {
            if let Some(s) = s {
                epoll.add(s.as_raw_fd(), token)?;
            }
        }
    }
    *mine = Some(present);
    Ok(())
}

impl Outbound {
    /// Reads until the queue is empty or the budget is used.
    fn drain(&mut self, engine: &Engine, tun: &Queue, sockets: Option<&SocketPair>) -> Amount {
        let mut packets = 0;
        let mut read = Amount::default();
        let core = &engine.core;
        while packets < DRAIN_PACKETS && read.bytes < DRAIN_BYTES {
            match tun.read(&mut self.buf) {
                Read::Packet(vnet, len) => {
                    // Before the first bind there is nobody to send to: the packet is dropped.
                    let Some(mut io) = sockets else { continue };
                    if packets == 0 {
                        self.tx.begin(core, now_ms());
                    }
                    packets += 1;
                    read.bytes += len;
                    read.singles += usize::from(vnet.is_single());
                    let packet = &mut self.buf[crate::offload::VNET_LEN..];
                    self.tx.packet(core, &mut io, &vnet, packet, len);
                }
                Read::Empty => break,
                Read::Gone => {
                    engine.shutdown();
                    break;
                }
                Read::Retry => {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                    break;
                }
            }
        }
        if let (true, Some(mut io)) = (packets > 0, sockets) {
            self.tx.end(core, &mut io);
        }
        read
    }
}

impl Inbound {
    fn receive(&mut self, engine: &Engine, tun: &Queue, pair: &SocketPair, token: u64) -> usize {
        let socket = if token == TOKEN_V6 { &pair.v6 } else { &pair.v4 };
        let Some(socket) = socket else { return 0 };
        if !self.receiver.receive(socket, self.limit) {
            return 0;
        }
        let large = self.receiver.received.first().is_some_and(|r| r.len > LARGE);
        self.limit = if large { LARGE_BATCH } else { BATCH };
        if NO_SUPERPACKETS.load(Relaxed) {
            self.rx.coalescer.disable();
        }
        self.rx.batch(&engine.core, now(), &self.receiver.received, &mut self.receiver.bufs);
        for g in self.rx.coalescer.groups() {
            if let Err(e) = tun.write(&self.receiver.bufs, g, &mut self.iov) {
                // EIO: the interface is down. Anything else on a superpacket: the kernel dislikes it.
                if g.spans.len() > 1 && e.raw_os_error() == Some(libc::EINVAL) {
                    NO_SUPERPACKETS.store(true, Relaxed);
                    write_apart(tun, &self.receiver.bufs, g);
                }
            }
        }
        let datagrams = self.rx.coalescer.groups().iter().any(Group::is_datagrams);
        self.rx.coalescer.clear();
        if datagrams {
            yield_now();
        }
        self.receiver.received.iter().map(|r| r.len).sum()
    }
}

/// Slow path: writes a refused superpacket as single packets.
fn write_apart(tun: &Queue, bufs: &RecvBuffers, group: &Group) {
    let len = group_len(&group.spans);
    let mut packet = Vec::with_capacity(len + TAIL_ROOM);
    for s in &group.spans {
        packet.extend_from_slice(bufs.bytes(*s));
    }
    let mut segments = Segmenter::default();
    if crate::offload::outbound(&group.vnet, &mut packet, &mut segments) == Some(true) {
        for i in 0..segments.count {
            let start = segments.prepare(i, &mut packet);
            // The device may be going away: a lost packet is then no news.
            let _ = tun.write_plain(&packet[start..start + segments.len(i)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Amount, Load};

    fn bytes(bytes: usize) -> Amount {
        Amount { bytes, singles: 0 }
    }

    #[test]
    fn bulk_is_told_from_sparse() {
        let mut l = Load::default();
        assert!((1..100).all(|i| !l.bulk(i * 2000, bytes(1420))), "a packet every 2 ms");
        assert!(l.bulk(300_000, bytes(60_000)), "one superpacket");
        assert!(l.bulk(300_100, bytes(100)), "the acknowledgement right after");
        assert!(!l.bulk(301_000, bytes(100)), "a while later");
        let mut l = Load::default();
        assert!(
            (0..100u64).filter(|i| l.bulk(1000 + i * 10, bytes(1328))).count() > 80,
            "small packets in a row"
        );
        assert!(!l.flood(), "they came in superpackets");
    }

    #[test]
    fn a_flood_is_many_single_packets() {
        let one = Amount { bytes: 1328, singles: 1 };
        let flooded = |gap: u64| {
            let mut l = Load::default();
            (1..200).filter(|i| (l.bulk(i * gap, one), l.flood()).1).count()
        };
        assert_eq!(flooded(20), 0, "50,000 a second, as the acknowledgements of a fast stream");
        assert!(flooded(10) > 150, "100,000 a second");
        let mut l = Load::default();
        l.bulk(1000, Amount { bytes: 40_000, singles: 30 });
        assert!(l.flood());
        l.bulk(1150, Amount { bytes: 10, singles: 1 });
        assert!(l.flood(), "it is remembered for a window");
        l.bulk(1500, Amount { bytes: 10, singles: 1 });
        l.bulk(1900, Amount { bytes: 10, singles: 1 });
        assert!(!l.flood(), "and then over");
    }
}
