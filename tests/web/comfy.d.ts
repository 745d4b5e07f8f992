/** What the player uses of ComfyUI's front end. Members that some version or a later one lacks are optional. */

interface ComfyWidget {
  name?: string;
  value?: unknown;
  serialize?: boolean;
  beforeQueued?(): void;
}

interface ComfyGraph {
  id?: string;
  nodes?: ComfyNode[];
  extra?: Record<string, unknown>;
  getNodeById?(id: string | number): ComfyNode | null | undefined;
}

interface ComfyNode {
  id: string | number;
  comfyClass?: string;
  widgets?: ComfyWidget[];
  graph?: ComfyGraph | null;
  subgraph?: ComfyGraph;
  size?: ArrayLike<number>;
  hideOutputImages?: boolean;
  onRemoved?: (this: ComfyNode) => void;
  onExecuted?: (this: ComfyNode, output: unknown) => void;
  addDOMWidget?(
    name: string,
    type: string,
    element: HTMLElement,
    options: { serialize?: boolean; hideOnZoom?: boolean; hideInPanel?: boolean; getMinHeight?: () => number },
  ): ComfyWidget;
}

declare module "*/scripts/app.js" {
  export const app: {
    graph?: ComfyGraph;
    rootGraph?: ComfyGraph;
    canvas?: { setDirty?(foreground: boolean, background?: boolean): void };
    nodeOutputs?: Record<string, unknown>;
    extensionManager?: { workflow?: { activeWorkflow?: object | null } };
    registerExtension?(extension: {
      name: string;
      setup?(): void;
      nodeCreated?(node: ComfyNode): void;
      loadedGraphNode?(node: ComfyNode): void;
      afterConfigureGraph?(): void;
    }): void;
  };
}

declare module "*/scripts/api.js" {
  export const api: {
    clientId?: string;
    apiURL?(route: string): string;
    addEventListener?(type: string, listener: (event: CustomEvent<unknown>) => void): void;
    fetchApi?(route: string, options?: RequestInit): Promise<Response>;
    interrupt?(promptId: string | null): Promise<void>;
  };
}
