//! Test harness: several protocol cores on one virtual network and one virtual clock.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use crate::crypto::{Key, SecretKey};
use crate::device::{Core, Now};
use crate::events::Queue;
use crate::offload::{Buffers, Coalescer, Span, VnetHdr};
use crate::packet::build;
use crate::peer::{lock, Endpoint, Peer};
use crate::rx::{Received, Rx};
use crate::tx::{execute, Sent, Transmit, Tx, TAIL_ROOM};
use crate::uapi::{admissible, configure, parse_set};

/// A datagram on the wire.
#[derive(Debug, Clone)]
pub struct Datagram {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub bytes: Vec<u8>,
}

/// Collects what a core sends.
pub struct Wire {
    pub from: SocketAddr,
    pub sent: Vec<Datagram>,
}

impl Transmit for Wire {
    fn transmit(&mut self, to: &Endpoint, data: &[u8], segment: usize) -> Sent {
        for part in data.chunks(segment.max(1)) {
            self.sent.push(Datagram { from: self.from, to: to.addr, bytes: part.to_vec() });
        }
        Sent::Done
    }
}

pub struct Memory(pub Vec<Vec<u8>>);

impl Buffers for Memory {
    fn bytes(&self, s: Span) -> &[u8] {
        &self.0[s.buf][s.off..s.off + s.len]
    }

    fn bytes_mut(&mut self, s: Span) -> &mut [u8] {
        &mut self.0[s.buf][s.off..s.off + s.len]
    }
}

pub struct Node {
    pub core: Core,
    pub wire: Wire,
    pub public: Key,
    tx: Tx,
    rx: Rx,
    /// Inner packets that came out, in order.
    pub delivered: Vec<Vec<u8>>,
}

pub fn hex(b: &[u8]) -> String {
    b.iter().map(|x| format!("{x:02x}")).collect()
}

pub fn at(ms: u64) -> Now {
    let wall = 1_700_000_000_000 + ms;
    Now { ms, wall_secs: wall / 1000, wall_nanos: (wall % 1000) as u32 * 1_000_000 }
}

impl Node {
    pub fn new(addr: &str, now: u64) -> Self {
        let secret = SecretKey::random();
        let public = secret.public();
        let core = Core::new(now, Queue::new(Box::new(|| ())), 1420);
        let mut n = Self {
            core,
            wire: Wire { from: addr.parse().unwrap(), sent: Vec::new() },
            public,
            tx: Tx::default(),
            rx: Rx::new(Coalescer::new(false, false)),
            delivered: Vec::new(),
        };
        n.set(now, &format!("private_key={}", hex(secret.expose()))).unwrap();
        n
    }

    /// Applies UAPI `set` lines.
    pub fn set(&mut self, now: u64, lines: &str) -> Result<(), i32> {
        let c = parse_set(lines.lines()).map_err(|e| e.0)?;
        admissible(&self.core, &c).map_err(|e| e.0)?;
        configure(&self.core, c, now);
        Ok(())
    }

    pub fn peer(&self, public: &Key) -> Arc<Peer> {
        lock(&self.core.control).peers[public].clone()
    }

    /// Runs events and timers at `now`.
    pub fn pump(&mut self, now: u64) {
        let mut actions = Vec::new();
        // Timers may queue events, as the descriptor would wake the control loop again.
        for _ in 0..2 {
            while let Some((e, backlog)) = self.core.queue.pop() {
                self.core.handle(e, backlog, at(now), &mut actions);
                execute(&self.core, &mut actions, &mut self.tx, &mut self.wire, now);
            }
            self.core.tick(at(now), &mut actions);
            execute(&self.core, &mut actions, &mut self.tx, &mut self.wire, now);
        }
    }

    /// Sends an inner packet.
    pub fn send(&mut self, now: u64, packet: &[u8]) {
        let mut buf = packet.to_vec();
        buf.resize(packet.len() + TAIL_ROOM, 0xee);
        self.tx.begin(&self.core, now);
        self.tx.packet(&self.core, &mut self.wire, &VnetHdr::default(), &mut buf, packet.len());
        self.tx.end(&self.core, &mut self.wire);
    }

    /// Receives a batch of datagrams, without running the control side.
    pub fn receive(&mut self, now: u64, datagrams: &[Datagram]) {
        let mut mem = Memory(datagrams.iter().map(|d| d.bytes.clone()).collect());
        let received: Vec<Received> = datagrams
            .iter()
            .enumerate()
            .map(|(buf, d)| Received {
                buf,
                len: d.bytes.len(),
                segment: 0,
                from: Endpoint { addr: d.from, src: None },
            })
            .collect();
        self.rx.batch(&self.core, at(now), &received, &mut mem);
        for g in self.rx.coalescer.groups() {
            self.delivered.push(g.spans.iter().flat_map(|s| mem.bytes(*s).to_vec()).collect());
        }
        self.rx.coalescer.clear();
    }
}

/// What the network does to a datagram.
pub enum Fate {
    Drop,
    /// Deliver after these delays, one copy each.
    Deliver(Vec<u64>),
}

pub struct Net {
    pub now: u64,
    pub nodes: Vec<Node>,
    pub flying: Vec<(u64, Datagram)>,
    /// Everything that was ever on the wire.
    pub log: Vec<(u64, Datagram)>,
}

pub const A: &str = "192.0.2.1:1000";
pub const B: &str = "192.0.2.2:2000";

impl Net {
    /// Two nodes that are each other's peers: 10.0.0.1, fd00::1 and 10.0.0.2, fd00::2.
    pub fn pair() -> Self {
        Self::pair_with("", "")
    }

    /// The same with more lines in each peer section.
    pub fn pair_with(extra_a: &str, extra_b: &str) -> Self {
        let now = 1_000_000;
        let mut a = Node::new(A, now);
        let mut b = Node::new(B, now);
        let psk = "11".repeat(32);
        let section = |public: &Key, ep: &str, n: u8, extra: &str| {
            format!(
                "public_key={}\npreshared_key={psk}\nendpoint={ep}\nallowed_ip=10.0.0.{n}/32\nallowed_ip=fd00::{n}/128\n{extra}",
                hex(public)
            )
        };
        let (pa, pb) = (a.public, b.public);
        a.set(now, &section(&pb, B, 2, extra_a)).unwrap();
        b.set(now, &section(&pa, A, 1, extra_b)).unwrap();
        Self { now, nodes: vec![a, b], flying: Vec::new(), log: Vec::new() }
    }

    /// Moves what nodes sent onto the wire.
    pub fn collect(&mut self, fate: &mut impl FnMut(&Datagram) -> Fate) {
        for n in &mut self.nodes {
            for d in n.wire.sent.drain(..) {
                self.log.push((self.now, d.clone()));
                if let Fate::Deliver(delays) = fate(&d) {
                    self.flying.extend(delays.iter().map(|x| (self.now + x, d.clone())));
                }
            }
        }
    }

    /// Runs for `ms`, in steps of 1 ms while something flies, else from deadline to deadline.
    pub fn run_with(&mut self, ms: u64, mut fate: impl FnMut(&Datagram) -> Fate) {
        let end = self.now + ms;
        loop {
            for n in &mut self.nodes {
                n.pump(self.now);
            }
            self.collect(&mut fate);
            let due: Vec<Datagram> = {
                let now = self.now;
                self.flying.extract_if(.., |f| f.0 <= now).map(|f| f.1).collect()
            };
            for n in &mut self.nodes {
                let mine: Vec<Datagram> = due.iter().filter(|d| d.to == n.wire.from).cloned().collect();
                if !mine.is_empty() {
                    n.receive(self.now, &mine);
                    n.pump(self.now);
                }
            }
            self.collect(&mut fate);
            if self.now >= end {
                return;
            }
            let next = self.nodes.iter().filter_map(|n| n.core.next_tick());
            let next = next.chain(self.flying.iter().map(|f| f.0)).min().unwrap_or(end);
            self.now = next.clamp(self.now + 1, end);
        }
    }

    /// Runs over a perfect network with 1 ms delay.
    pub fn run(&mut self, ms: u64) {
        self.run_with(ms, |_| Fate::Deliver(vec![1]));
    }

    /// Datagrams of one type since `since`.
    pub fn count(&self, kind: u8, since: u64) -> usize {
        self.log.iter().filter(|(t, d)| *t >= since && d.bytes[0] == kind).count()
    }

    pub fn session_up(&self, i: usize) -> bool {
        let n = &self.nodes[i];
        let other = self.nodes[1 - i].public;
        let up = n.peer(&other).current.load().as_ref().is_some_and(|s| s.usable(self.now));
        up
    }
}

/// An inner UDP packet from node `from` (0 or 1) to the other, carrying `n`.
pub fn inner(from: usize, n: u32) -> Vec<u8> {
    let ip = |i: usize| -> IpAddr { format!("10.0.0.{}", i + 1).parse().unwrap() };
    build::l4(ip(from), ip(1 - from), crate::packet::UDP, 0, 0, &n.to_be_bytes())
}

pub fn number_in(packet: &[u8]) -> u32 {
    u32::from_be_bytes(packet[packet.len() - 4..].try_into().unwrap())
}

pub fn rx_bytes(n: &Node, peer: &Key) -> u64 {
    n.peer(peer).rx_bytes.load(Relaxed)
}

/// A small generator, so that every run is the same.
pub struct Rng(pub u64);

impl Rng {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}
